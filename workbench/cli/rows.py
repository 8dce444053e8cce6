"""Stored rows, as the subcommands ask for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from workbench import api

if TYPE_CHECKING:
    from workbench.records import Row


def stored(places: Sequence[str], everything: bool = False, quiet: bool = False) -> list[Row]:
    """Stored rows (`everything`: with the measurements that later ones superseded), the bad lines told."""
    return api.rows(*places, history=everything, say=lambda text: None if quiet else tell(text))


def tell(warning: str) -> None:
    """Of a line that is no row."""
    print(f"warning: {warning}", file=sys.stderr)
