"""What reads stored rows: `table`, `compare`, `recommend`, `report`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from workbench.cli import options as o
from workbench.cli.rows import stored
from workbench.console import write
from workbench.errors import UserError, check_known
from workbench.report.formats import FILE_FORMATS, FORMATS


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
        found = [row for row in stored(rows or [results]) if recipe in (None, row.recipe)]
        write(output, FILE_FORMATS[format]([row for row in found if machine in (None, row.machine.name)]))
        return
    check_known("format", format, [*FORMATS, *FILE_FORMATS])
    write(output, FORMATS[format](build(stored(rows or [results]), machine=machine, recipe=recipe)))


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
    known = [] if all(places) else stored([results], everything=True)
    if not all(places) and not known:
        raise UserError(f"{results}: nothing measured yet, so no date or commit to choose")
    before, after = (
        stored([place], everything=True) if place else wing.select(known, spec)
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
    table = build(stored(rows or [results]), machine=machine, recipe=recipe)
    found = wing.recommend(table, constraints, lambda row: serving_command(row, str(home())))
    sys.stdout.write(wing.json_text(found) if format == "json" else wing.text(found))
    row = found.choice.line.row if found.choice else None
    if row and not os.path.exists(local(row.artifact.path)):
        print(f"its files are not here: `workbench quantize` of recipe '{row.recipe}' makes them", file=sys.stderr)
    raise typer.Exit(0 if row else 1)


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
    table = build(stored(places), machine=machine, recipe=recipe)
    series = series_like(table, series_of(stored(places, everything=True, quiet=True)))
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
