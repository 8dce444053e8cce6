"""The forms that results are written in. An output format is one file and one line here.

A table is text; a file holds the rows of all machines, recipes and evaluations, since who reads it chooses for
himself what to put side by side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pandas

    from workbench.records import Row
    from workbench.report.table import Table


def _writer(module: str, function: str) -> Callable[..., Any]:
    """A function of a module beside this one, imported when it is called: help texts need the names alone."""

    def write(*what: object) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*what)

    return write


class TableFormat(Protocol):
    """How a table is written: all of it, or only the columns of these keys of `data.flattened`."""

    def __call__(self, table: Table, columns: Sequence[str] = (), /) -> str: ...


FORMATS: dict[str, TableFormat] = {
    "terminal": _writer("terminal", "terminal"),
    "markdown": _writer("markdown", "markdown"),
    "csv": _writer("data", "comma_separated"),
    "json": _writer("data", "json_text"),
}
data_frame: Callable[[Table], pandas.DataFrame] = _writer("frame", "data_frame")
FILE_FORMATS: dict[str, Callable[[Sequence[Row]], bytes]] = {
    "parquet": _writer("parquet", "parquet"),
}
