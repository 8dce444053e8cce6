"""The command line: one function a subcommand, each a single library call; what they take is in `options.py`.

Nothing heavy is imported here at top level, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from workbench import __version__
from workbench import options as o
from workbench.console import Console, command, write
from workbench.errors import UserError, check_known
from workbench.report.formats import FILE_FORMATS, FORMATS

if TYPE_CHECKING:
    from workbench.records import Row

app = typer.Typer(
    name="workbench",
    help="Quantize a language model every way, run it in every engine, compare what comes out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(cache_app := typer.Typer(help="What was made and is kept.", no_args_is_help=True), name="cache")


@app.callback(invoke_without_command=True)
def _top(version: o.Version = False) -> None:
    if version:
        print(f"workbench {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: o.RecipeFile,
    results: o.Results = o.RESULTS,
    backend: o.OnlyBackends = None,
    variant: o.OnlyVariants = None,
    again: o.Again = False,
    format: o.TableFormat = "terminal",
    quiet: o.Quiet = False,
) -> None:
    """Quantize, profile and print the table."""
    from workbench import cache, pipeline
    from workbench.recipe.load import load
    from workbench.report.table import build

    check_known("format", format, FORMATS)
    loaded = load(recipe)
    for name in backend or []:
        loaded.backend(name)  # A misspelt one is refused before any work.
    chosen, show = loaded.matching(variant) if variant else None, Console(quiet)
    with cache.at_work(show.say):
        made = pipeline.quantize(loaded, show, chosen)
        rows = pipeline.profile(loaded, made, show, results, backends=backend, variants=variant, again=again)
    write(None, FORMATS[format](build(rows)))
    raise typer.Exit(1 if made.failures or any(row.error for row in rows) else 0)


@app.command()
def quantize(recipe: o.RecipeFile, variant: o.OnlyVariants = None, quiet: o.Quiet = False) -> None:
    """Make every variant of a recipe, and say where it is."""
    from workbench import cache, pipeline
    from workbench.recipe.load import load
    from workbench.sizes import mib_text

    loaded = load(recipe)
    chosen, show = loaded.matching(variant) if variant else None, Console(quiet)
    with cache.at_work(show.say):
        made = pipeline.quantize(loaded, show, chosen)
    for name, artifacts in made.artifacts.items():
        for artifact in artifacts:
            bits = f"{artifact.bits_per_weight:.2f} bits/weight" if artifact.bits_per_weight else ""
            print(f"{name:32} {bits:22} {mib_text(artifact.disk_bytes):>13}  {artifact.path}")
            for warning in artifact.warnings:
                print(f"{'':32} warning: {warning}")
    for name, reason in made.refused.items():
        print(f"{name:32} {reason}")
    for name, reason in made.failures.items():
        print(f"{name:32} failed: {reason}", file=sys.stderr)
    raise typer.Exit(1 if made.failures else 0)


@app.command()
def profile(
    recipe: o.SomeRecipe = None,
    results: o.Results = o.RESULTS,
    backend: o.OnlyBackends = None,
    variant: o.OnlyVariants = None,
    again: o.Again = False,
    format: o.TableFormat = "terminal",
    quiet: o.Quiet = False,
) -> None:
    """Run every variant in every engine and store what is measured."""
    from workbench.home import recipe_or_last

    run(recipe_or_last(recipe), results, backend, variant, again, format, quiet)


@app.command()
def table(
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
    format: o.RowsFormat = "terminal",
    output: o.Output = None,
) -> None:
    """Print the comparison table of stored rows; as Parquet, the rows of all machines and evaluations."""
    from workbench.report.table import build

    if format in FILE_FORMATS:
        if output is None and sys.stdout.isatty():
            raise UserError(f"{format.capitalize()} is not for a terminal: name a file with --output rows.{format}")
        found = [row for row in _stored(rows or [results]) if recipe in (None, row.recipe)]
        write(output, FILE_FORMATS[format]([row for row in found if machine in (None, row.machine.name)]))
        return
    check_known("format", format, FORMATS)
    write(output, FORMATS[format](build(_stored(rows or [results]), machine=machine, recipe=recipe)))


@app.command()
def compare(
    old: o.OldRows,
    new: o.NewRows,
    results: o.Results = o.RESULTS,
    fail: o.Limits = None,
    machine: o.OnlyMachine = None,
    recipe: o.OnlyRecipe = None,
    evaluation: o.OnlyEvaluation = None,
    measurement_version: o.OnlyMeasurement = None,
    everything: o.Everything = False,
    format: o.TextFormat = "terminal",
) -> None:
    """Compare two sets of rows, metric by metric: better, worse, same or undecided."""
    from workbench.report.verdicts import compare as wing

    check_known("format", format, ["terminal", "json"])
    limits = dict(wing.parse_limit(each) for each in fail or [])
    places = [spec if "://" in spec or os.path.exists(spec) else None for spec in (old, new)]
    known = [] if all(places) else _stored([results], everything=True)
    if not all(places) and not known:
        raise UserError(f"{results}: nothing measured yet, so no date or commit to choose")
    before, after = (
        _stored([place], everything=True) if place else wing.select(known, spec)
        for place, spec in zip(places, (old, new), strict=True)
    )
    only = {"machine": machine, "evaluation": evaluation, "recipe": recipe}
    found = wing.compare(before, after, thresholds=limits, measurement_version=measurement_version, **only)
    sys.stdout.write(wing.json_text(found) if format == "json" else wing.text(found, everything))
    for line in wing.doubts(found, limits):
        print(f"undecided, measure more: {line}", file=sys.stderr)
    broken = wing.failures(found, limits)
    for line in broken:
        print(f"fail: {line}", file=sys.stderr)
    raise typer.Exit(1 if broken else 0)


@app.command()
def recommend(
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    memory: o.AtMostMemory = None,
    max_size: o.AtMostSize = None,
    max_perplexity: o.AtMostPerplexity = None,
    max_kld: o.AtMostKld = None,
    min_decode: o.AtLeastDecode = None,
    min_prefill: o.AtLeastPrefill = None,
    backend: o.OnlyBackend = None,
    sort: o.Sort = "speed",
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
    format: o.TextFormat = "terminal",
) -> None:
    """Choose a variant and an engine under limits; exit with 1 if nothing fits."""
    from workbench.home import home, local
    from workbench.report.table import build
    from workbench.report.verdicts import recommend as wing
    from workbench.sizes import parse_size
    from workbench.worker.backends import serving_command

    check_known("format", format, ["terminal", "json"])
    relative, value = wing.parse_share(max_perplexity, "--max-perplexity") if max_perplexity else (None, None)
    constraints = wing.Constraints(
        memory_bytes=parse_size(memory, "--memory") if memory else None,
        size_bytes=parse_size(max_size, "--max-size") if max_size else None,
        max_perplexity=relative,
        max_perplexity_value=value,
        max_kld=max_kld,
        min_decode_tok_s=min_decode,
        min_prefill_tok_s=min_prefill,
        backend=backend,
        sort=sort,
    )
    table = build(_stored(rows or [results]), machine=machine, recipe=recipe)
    found = wing.recommend(table, constraints, lambda row: serving_command(row, str(home())))
    sys.stdout.write(wing.json_text(found) if format == "json" else wing.text(found))
    row = found.choice.line.row if found.choice else None
    if row and not os.path.exists(local(row.artifact.path)):
        print(f"its files are not here: `workbench quantize` of recipe '{row.recipe}' makes them", file=sys.stderr)
    raise typer.Exit(0 if row else 1)


@app.command()
def plan(
    recipe: o.RecipeFile,
    memory: o.Memory = None,
    context: o.Context = None,
    batch: o.Batch = None,
    device: o.Device = None,
    format: o.TextFormat = "terminal",
) -> None:
    """What each variant will need in each engine, and what fits, before anything is made; exit 1 if nothing fits."""
    from workbench.plan import formats
    from workbench.plan import make as wing
    from workbench.recipe.load import load
    from workbench.sizes import parse_size

    check_known("format", format, formats.FORMATS)
    if device is not None:
        check_known("device", device, ["cpu", "cuda"])
    memory_bytes = parse_size(memory, "--memory") if memory else None
    cuda = None if device is None else device == "cuda"
    made = wing.make(load(recipe), memory_bytes=memory_bytes, context=context, batch=batch, cuda=cuda)
    sys.stdout.write(formats.FORMATS[format](made))
    raise typer.Exit(0 if any(need.fits for need in made.needs) else 1)


@app.command()
def report(
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    output: o.Page = Path("report.html"),
    plots: o.Plots = None,
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
) -> None:
    """Write one self-contained HTML page with the table, the plots and where the numbers come from."""
    from workbench.report.site.page import page
    from workbench.report.site.plots import plots as plots_of
    from workbench.report.site.svg import png, standalone
    from workbench.report.table import build
    from workbench.report.verdicts.steps import series_like, series_of, steps_of

    places = rows or [results]
    table = build(_stored(places), machine=machine, recipe=recipe)
    series = series_like(table, series_of(_stored(places, everything=True, quiet=True)))
    steps = [step for one in series for step in steps_of(one)]
    write(output, page(table, series, steps))
    print(output)
    if plots is None:
        return
    for plot in plots_of(table, series, steps):
        svg = standalone(plot.wide)
        write(plots / f"{plot.name}.svg", svg)
        picture = png(svg)
        if picture is not None:
            write(plots / f"{plot.name}.png", picture)


@app.command()
def publish(folder: o.SiteFolder, results: o.Results = o.RESULTS, url: o.SiteUrl = "") -> None:
    """Write a static site: latest tables, history, regressions, a feed and a badge."""
    from workbench.report.site import publish as wing

    still = wing.publish(_stored([results], everything=True), folder, url)
    print(folder / "index.html")
    for step in still:
        where = wing.path_of(step.series.machine, step.series.recipe)
        print(f"{step.series.label}: {step.metric} {step.relative:+.1%} since {step.first.at[:10]} ({where})")


@app.command()
def nightly(
    recipes: o.Recipes,
    results: o.Results = o.RESULTS,
    site: o.NightlySite = None,
    url: o.NightlyUrl = "",
    issue: o.Issue = False,
    accept: o.Accept = False,
    backend: o.OnlyBackends = None,
    quiet: o.Quiet = False,
) -> None:
    """Measure recipes anew and compare with the good nights before; exit with 1 if something got worse."""
    from workbench import nightly as wing
    from workbench.recipe.load import load

    loaded = [load(recipe) for recipe in recipes]
    if accept:
        for recipe in loaded:
            print(f"{recipe.name}: the night of {wing.accept(recipe, results)} is the new normal")
        return
    nights = wing.run(loaded, results, Console(quiet), site=site, url=url, issue=issue, backends=backend)
    for night in nights:
        sys.stdout.write(night.text)
    raise typer.Exit(1 if any(night.verdict.alarms or night.failures for night in nights) else 0)


@app.command()
def card(
    variant: o.MadeVariant,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    licence: o.Licence = None,
    author: o.Author = "",
    output: o.Output = None,
) -> None:
    """Write a variant's model card: front matter for the hub, the measured table, provenance, licence."""
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = _stored([results])
    row = cards.find(rows, variant, recipe)
    write(output, cards.card(rows, row, licence or wing.licence_of(row, rows), author))


@app.command()
def push(
    variant: o.MadeVariant,
    repository: o.Repository,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    licence: o.Licence = None,
    author: o.Author = "",
    private: o.Private = False,
    anyway: o.Anyway = False,
) -> None:
    """Upload a variant with its card to the hub, if the base's licence permits it."""
    from workbench.cache import at_work
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = _stored([results])
    row = cards.find(rows, variant, recipe)
    with at_work(Console().say):
        print(wing.push(rows, row, repository, licence=licence, author=author, private=private, anyway=anyway))


@app.command()
def doctor() -> None:
    """Which engines are found, where, in which versions, and what each can load."""
    from workbench.doctor import report

    raise typer.Exit(report())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from workbench.recipe.json_schema import schema as make_schema

    print(json.dumps(make_schema(), indent=2))


@app.command()
def clean(everything: o.Finished = False) -> None:
    """Remove unfinished work, logs and (with --all) every artifact from the cache; not while a run goes on."""
    from workbench.cache import clean as sweep
    from workbench.sizes import mib_text

    print(f"{mib_text(sweep(everything))} freed")


@cache_app.command()
def verify(quiet: o.Quiet = False) -> None:
    """Read everything in the cache through, and compare it with its checksums; exit with 1 if something changed."""
    from workbench.cache import verify as read_through

    raise typer.Exit(read_through(Console(quiet)))


def _stored(places: Sequence[str], everything: bool = False, quiet: bool = False) -> list[Row]:
    """Stored rows (`everything`: with the measurements that later ones superseded), the bad lines told."""
    from workbench.report import store

    found, warnings = (store.history if everything else store.read)(*places)
    for warning in [] if quiet else store.few(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    return found


def main() -> None:  # the console script
    command(app)


if __name__ == "__main__":
    main()
