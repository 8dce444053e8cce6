"""The forms that results are written in. An output format is one file and one line here: where its function is, which
is imported when it is called, since the command line's help names all formats.

A table is text; a file holds the rows of all machines, recipes and evaluations, since who reads it chooses for
himself what to put side by side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.records import Row
    from workbench.report.table import Table


def _by(module: str, function: str) -> Callable[[Any], Any]:
    return lambda what: getattr(importlib.import_module(f"workbench.report.formats.{module}"), function)(what)


FORMATS: dict[str, Callable[[Table], str]] = {
    "terminal": _by("terminal", "terminal"),
    "markdown": _by("markdown", "markdown"),
    "csv": _by("data", "comma_separated"),
    "json": _by("data", "json_text"),
}
FILE_FORMATS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "parquet": _by("parquet", "parquet"),
}
