"""This machine and its cache: `doctor`, `schema`, `clean`, `cache`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import typer

from workbench.cli import options as o
from workbench.console import Console
from workbench.errors import UserError


def doctor() -> None:
    """Which engines are found, where, in which versions, and what each can load."""
    from workbench.doctor import report

    raise typer.Exit(report())


def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from workbench.recipe.json_schema import schema as make_schema

    print(json.dumps(make_schema(), indent=2))


def clean(everything: o.Finished = False, yes: o.Yes = False) -> None:
    """Remove unfinished work, logs and (with --all) every artifact from the cache; not while a run goes on."""
    from workbench import cache
    from workbench.home import home
    from workbench.sizes import mib_text, size_text

    if everything and not yes and (made := cache.held()):
        lost = f"{len(made)} entries, {size_text(sum(each.size_bytes for each in made))}"
        if not sys.stdin.isatty():
            raise UserError(f"--all removes all that was made ({lost}): add --yes where nobody can be asked")
        typer.confirm(f"Remove all that was made, {lost}, from {home()}?", abort=True)
    print(f"{mib_text(cache.clean(everything))} freed")


def ls() -> None:
    """What was made and is kept, the recipes that it was made for, and its size."""
    from workbench.cache import held, unfinished
    from workbench.home import home
    from workbench.sizes import mib_text

    found = sorted(held(), key=lambda each: (sorted(each.recipes), -each.size_bytes))
    for each in found:
        day = time.strftime("%Y-%m-%d", time.localtime(each.made_s))
        print(f"{mib_text(each.size_bytes):>13}  {day}  {each.what:40} {', '.join(sorted(each.recipes)) or '-'}")
    print(f"{mib_text(sum(each.size_bytes for each in found)):>13}  in {home()}")
    if left := unfinished():
        print(f"{mib_text(left):>13}  of unfinished work and logs: `workbench clean` removes them")


def rm(recipe: o.MadeRecipe) -> None:
    """Remove what was made for a recipe and for no other; not while a run goes on."""
    from workbench.cache import forget
    from workbench.recipe.load import load
    from workbench.sizes import mib_text

    print(f"{mib_text(forget(load(recipe).name if Path(recipe).is_file() else recipe))} freed")


def verify(quiet: o.Quiet = False) -> None:
    """Read everything in the cache through, and compare it with its checksums; exit with 1 if something changed."""
    from workbench.cache import verify as read_through

    raise typer.Exit(read_through(Console(quiet)))
