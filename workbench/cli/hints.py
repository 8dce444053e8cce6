"""Where things are and what to type next: said on standard error after a table for people, not after data."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.cli.options import RESULTS

if TYPE_CHECKING:
    from workbench.records import Row


def after_run(recipe: Path, results: str, rows: Sequence[Row], store: str | None) -> None:
    """Of a recipe's rows; `store`: where machines share what is made."""
    from workbench.home import home

    if rows:
        _say(f"rows:  {results.rstrip('/')}/{rows[0].machine.name}")
    copies = f"workbench quantize {shlex.quote(str(recipe))} -o DIR" + (f" --store {store}" if store else "")
    _say(f"files: {f'{store}/artifacts' if store else home() / 'artifacts'}; `{copies}` copies them")
    after_table([] if results == RESULTS else ["--results", results])


def after_table(where: Sequence[str]) -> None:
    """What else reads the same rows; `where`: the words that name them."""
    rows = "".join(f" {shlex.quote(word)}" for word in where)
    _say(f"next:  workbench recommend{rows} --memory 8GiB --max-perplexity 1%   # which to take, and how to serve it")
    _say(f"       workbench report{rows} -o report.html   # the table and plots as one page")


def after_quantize(recipe: Path, copied: bool) -> None:
    """What to do with the files that were made."""
    name = shlex.quote(str(recipe))
    if not copied:
        _say(f"next:  workbench quantize {name} -o DIR   # the same files, copied to where you want them")
    _say(f"{'next: ' if copied else '      '} workbench profile {name}   # measure them in every engine")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
