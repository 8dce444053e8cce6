"""The command line: one function a subcommand, each a single library call; what they take is in `options.py`.

Nothing heavy is imported here at top level, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

from workbench import __version__
from workbench.cli import options as o
from workbench.cli.keeping import clean, doctor, ls, rm, schema, verify
from workbench.cli.making import plan, profile, quantize, run
from workbench.cli.reading import compare, cost, recommend, report, table
from workbench.cli.sharing import card, nightly, publish, push
from workbench.console import command

COMMANDS = (
    *(run, quantize, profile, table, compare, recommend, cost, plan, report),
    *(publish, nightly, card, push, doctor, schema, clean),
)
"""In the order of `--help`."""
CACHE_COMMANDS = (ls, rm, verify)

app = typer.Typer(
    name="workbench",
    help="Quantize a language model every way, run it in every engine, compare what comes out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for each in COMMANDS:
    app.command()(each)
app.add_typer(cache_app := typer.Typer(help="What was made and is kept.", no_args_is_help=True), name="cache")
for below in CACHE_COMMANDS:
    cache_app.command()(below)


@app.callback(invoke_without_command=True)
def _top(version: o.Version = False) -> None:
    if version:
        print(f"workbench {__version__}")
        raise typer.Exit


def main() -> None:  # the console script
    command(app)
