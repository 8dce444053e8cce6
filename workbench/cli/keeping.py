"""This machine and its cache: `doctor`, `schema`, `clean`, `cache`."""

from __future__ import annotations

import typer

from workbench.cli import options as o
from workbench.console import Console


def doctor() -> None:
    """Which engines are found, where, in which versions, and what each can load."""
    from workbench.doctor import report

    raise typer.Exit(report())


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from workbench.recipe.json_schema import schema as make_schema

    print(json.dumps(make_schema(), indent=2))


def clean(everything: o.Finished = False) -> None:
    """Remove unfinished work, logs and (with --all) every artifact from the cache; not while a run goes on."""
    from workbench.cache import clean as sweep
    from workbench.sizes import mib_text

    print(f"{mib_text(sweep(everything))} freed")


def verify(quiet: o.Quiet = False) -> None:
    """Read everything in the cache through, and compare it with its checksums; exit with 1 if something changed."""
    from workbench.cache import verify as read_through

    raise typer.Exit(read_through(Console(quiet)))
