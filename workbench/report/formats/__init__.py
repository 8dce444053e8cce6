"""The forms that results are written in. An output format is one file and one line here.

A table is text; a file holds the rows of all machines, recipes and evaluations, since who reads it chooses for
himself what to put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workbench.records import Row
from workbench.report.formats.data import comma_separated, json_text
from workbench.report.formats.markdown import markdown
from workbench.report.formats.parquet import parquet
from workbench.report.formats.terminal import terminal
from workbench.report.table import Table

FORMATS: dict[str, Callable[[Table], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "json": json_text,
}
FILE_FORMATS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "parquet": parquet,
}
