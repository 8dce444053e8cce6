"""The forms that a table is written in. A format is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from workbench.report.formats.data import comma_separated, json_text
from workbench.report.formats.markdown import markdown
from workbench.report.formats.terminal import terminal
from workbench.report.table import Table

FORMATS: dict[str, Callable[[Table], str]] = {
    "terminal": terminal,
    "markdown": markdown,
    "csv": comma_separated,
    "json": json_text,
}
