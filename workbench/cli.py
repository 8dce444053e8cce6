"""The command line: one function a subcommand, each a single library call.

Nothing heavy is imported here at top level, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench import __version__
from workbench.errors import UserError, WorkFailed, unknown

app = typer.Typer(
    name="workbench",
    help="Quantize a language model every way, run it in every engine, compare what comes out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/smollm2-135m.yaml.", show_default=False)]
SomeRecipe = Annotated[
    Path | None,
    typer.Argument(help="A recipe; without one, that last quantized on this machine.", show_default=False),
]
Results = Annotated[Path, typer.Option("--results", help="The folder that rows are stored in.")]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", "-b", help="Only this engine; may be given several times.", show_default=False),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant", "-v", help="Only this variant, and the base to compare it with; may be repeated.",
        show_default=False,
    ),
]  # fmt: skip
Again = Annotated[bool, typer.Option("--again", help="Measure again what is already measured.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Format = Annotated[str, typer.Option("--format", "-f", help="terminal, markdown, csv or json.")]
RESULTS = Path("results")


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"workbench {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile, results: Results = RESULTS, backend: Backends = None, variant: Variants = None,
    again: Again = False, format: Format = "terminal", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Quantize, profile and print the table."""
    from workbench import pipeline
    from workbench.console import Console
    from workbench.recipe import load

    render = _renderer(format)
    loaded = load(recipe)
    for name in backend or []:
        loaded.backend(name)  # A misspelt one is refused before any work.
    made = pipeline.quantize(loaded, Console(quiet), _named(loaded, variant))
    rows = pipeline.profile(loaded, made, Console(quiet), results, backends=backend, variants=variant, again=again)
    render(rows)
    raise typer.Exit(1 if made.failures or any(row.error for row in rows) else 0)


@app.command()
def quantize(recipe: RecipeFile, variant: Variants = None, quiet: Quiet = False) -> None:
    """Make every variant of a recipe, and say where it is."""
    from workbench import pipeline
    from workbench.console import Console
    from workbench.recipe import load

    loaded = load(recipe)
    made = pipeline.quantize(loaded, Console(quiet), _named(loaded, variant))
    for name, artifacts in made.artifacts.items():
        for artifact in artifacts:
            bits = f"{artifact.bits_per_weight:.2f} bits/weight" if artifact.bits_per_weight else ""
            print(f"{name:32} {bits:22} {artifact.disk_bytes / 2**20:9.1f} MiB  {artifact.path}")
            for warning in artifact.warnings:
                print(f"{'':32} warning: {warning}")
    for name, reason in made.failures.items():
        print(f"{name:32} failed: {reason}", file=sys.stderr)
    raise typer.Exit(1 if made.failures else 0)


@app.command()
def profile(
    recipe: SomeRecipe = None, results: Results = RESULTS, backend: Backends = None, variant: Variants = None,
    again: Again = False, format: Format = "terminal", quiet: Quiet = False,
) -> None:  # fmt: skip
    """Run every variant in every engine and store what is measured."""
    run(_recipe(recipe), results, backend, variant, again, format, quiet)


@app.command()
def table(
    rows: Annotated[
        list[Path] | None,
        typer.Argument(help="Files or folders of rows; default: the results folder.", show_default=False),
    ] = None,
    results: Results = RESULTS,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    machine: Annotated[str | None, typer.Option(help="Only rows of the machine of this name.")] = None,
    format: Format = "terminal",
) -> None:
    """Print the comparison table of stored rows."""
    from workbench.report import store
    from workbench.report.table import build

    render = _renderer(format)
    found, warnings = store.read(*(rows or [results]))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    render(build(found, machine=machine, recipe=recipe))


@app.command()
def doctor() -> None:
    """Which engines are found, where, in which versions, and what each can load."""
    from workbench.doctor import report

    raise typer.Exit(report())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from workbench.recipe import schema as make_schema

    print(json.dumps(make_schema(), indent=2))


@app.command()
def clean(
    everything: Annotated[bool, typer.Option("--all", help="Finished artifacts too, not only leftovers.")] = False,
) -> None:
    """Remove unfinished work, logs and (with --all) every artifact from the cache."""
    from workbench.home import clean as sweep

    freed = sweep(everything)
    print(f"{freed / 2**20:.1f} MiB freed")


def _recipe(given: Path | None) -> Path:
    from workbench.home import last_recipe

    if given is not None:
        return given
    last = last_recipe()
    if last is None:
        raise UserError("no recipe was quantized here yet: run `workbench quantize RECIPE`, or name a recipe")
    if not last.exists():
        raise UserError(f"{last}: the recipe last quantized here is gone; name a recipe")
    return last


def _named(recipe: object, names: list[str] | None) -> set[str] | None:
    from workbench.recipe import Recipe

    assert isinstance(recipe, Recipe)
    return {recipe.variant(name).name for name in names} if names else None


def _renderer(format: str):  # type: ignore[no-untyped-def]
    """A function that prints a table, or the table of rows; an unknown format is refused before any work."""
    from workbench.report.formats import FORMATS
    from workbench.report.table import Table, build

    if format not in FORMATS:
        raise unknown("format", format, FORMATS)

    def render(what: object) -> None:
        built = what if isinstance(what, Table) else build(what)  # type: ignore[arg-type]
        sys.stdout.write(FORMATS[format](built))

    return render


def main() -> None:
    """The console script: a `UserError` is one line and exit code 2, an interrupt 130."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        # typer ends an interrupted command with this code and without a word.
        if stop.code == 130:
            print("\ninterrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
