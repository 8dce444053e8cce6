"""The program's nouns as frozen dataclasses, and their JSON form.

These cross from the parent to workers that may run under another interpreter, so the standard library is enough for
them; where msgspec is, what is read is checked. Units are SI and stand in the names (`load_s`, `disk_bytes`). Raw
samples are kept; a mean or an interval is a view (`report/metrics.py`).
"""

from workbench.records.codec import *  # noqa: F403
from workbench.records.limits import *  # noqa: F403
from workbench.records.machine import *  # noqa: F403
from workbench.records.rows import *  # noqa: F403
from workbench.records.scores import *  # noqa: F403
from workbench.records.serving import *  # noqa: F403
from workbench.records.work import *  # noqa: F403
