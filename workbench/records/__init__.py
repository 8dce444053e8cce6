"""The program's nouns as frozen dataclasses, and their JSON form.

Standard library only: these cross from the parent to workers that may run under another interpreter.
Units are SI and stand in the names (`load_s`, `disk_bytes`). Raw samples are kept; a mean or an
interval is a view (`report/metrics.py`). A pydantic model would check more, but would have to be
installed wherever an engine is; recipes, where people mistype, are checked in `recipe/`.
"""

from workbench.records.codec import *  # noqa: F403
from workbench.records.rows import *  # noqa: F403
from workbench.records.work import *  # noqa: F403
