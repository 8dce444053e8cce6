"""Stored rows, as the subcommands ask for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.records import Row


def stored(places: Sequence[str], everything: bool = False, quiet: bool = False) -> list[Row]:
    """Stored rows (`everything`: with the measurements that later ones superseded), the bad lines told."""
    from workbench.report import store

    found, warnings = (store.history if everything else store.read)(*places)
    for warning in [] if quiet else store.few(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return found
