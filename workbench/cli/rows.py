"""Stored rows, as the subcommands ask for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import api
from workbench.errors import UserError, check_known
from workbench.report.formats import FILE_FORMATS, FORMATS

if TYPE_CHECKING:
    from workbench.records import Row

ENDINGS = {".md": "markdown", ".csv": "csv", ".json": "json", ".parquet": "parquet"}
"""The format that a file's name asks for."""


def stored(places: Sequence[str], everything: bool = False, quiet: bool = False) -> list[Row]:
    """Stored rows (`everything`: with the measurements that later ones superseded), the bad lines told."""
    return api.rows(*places, history=everything, say=lambda text: None if quiet else tell(text))


def tell(warning: str) -> None:
    """Of a line that is no row."""
    print(f"warning: {warning}", file=sys.stderr)


def check_format(format: str, output: Path | None = None) -> None:
    """Raises `UserError` for a format that is none, and for one of files that would go to a terminal."""
    check_known("format", format, [*FORMATS, *FILE_FORMATS])
    if format in FILE_FORMATS and output is None and sys.stdout.isatty():
        raise UserError(f"{format.capitalize()} is not for a terminal: send it to a file, as with > rows.{format}")
