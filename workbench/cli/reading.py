"""What reads stored rows: `table`, `compare`, `recommend`, `cost`, `report`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import typer

from workbench import api
from workbench.cli import options as o
from workbench.cli.rows import ENDINGS, check_format, stored, tell
from workbench.console import write
from workbench.errors import UserError, check_known
from workbench.report.formats import FILE_FORMATS, FORMATS


def table(
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
    format: o.RowsFormat = None,
    columns: o.Columns = "",
    output: o.Output = None,
) -> None:
    """Print the comparison table of stored rows; as Parquet, the rows of all machines and evaluations."""
    from workbench.cli.hints import after_table
    from workbench.report.store import machine_named, machine_of

    format = format or (ENDINGS.get(output.suffix) if output else None) or "terminal"
    check_format(format, output)
    if format in FILE_FORMATS:
        found = [row for row in stored(rows or [results]) if recipe in (None, row.recipe)]
        if machine is not None:
            machine = machine_named(found, machine)
        write(output, FILE_FORMATS[format]([row for row in found if machine in (None, machine_of(row))]))
        return
    names = [name.strip() for name in columns.split(",") if name.strip()]
    write(output, FORMATS[format](api.table(stored(rows or [results]), machine=machine, recipe=recipe), names))
    if format == "terminal" and output is None:
        after_table(rows or ([] if results == o.RESULTS else ["--results", results]))


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
    """Compare two sets of rows, or two variants, metric by metric: better, worse, same or undecided."""
    from workbench.report.verdicts import compare as wing

    check_known("format", format, ["terminal", "json"])
    limits = dict(wing.parse_limit(each) for each in fail or [])
    only = {"machine": machine, "evaluation": evaluation, "recipe": recipe}
    found = api.compare(old, new, results, thresholds=limits, measurement_version=measurement_version, say=tell, **only)
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
    min_served: o.AtLeastServed = None,
    min_accuracy: o.AtLeastAccuracy = None,
    batch: o.WishedBatch = None,
    context: o.WishedContext = None,
    backend: o.OnlyBackend = None,
    sort: o.Sort = "speed",
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
    format: o.TextFormat = "terminal",
) -> None:
    """Choose a variant and an engine under limits; exit with 1 if nothing fits."""
    from workbench.home import local
    from workbench.report.verdicts import recommend as wing

    check_known("format", format, ["terminal", "json"])
    found = api.recommend(
        stored(rows or [results]),
        memory=memory,
        max_size=max_size,
        max_perplexity=max_perplexity,
        max_kld=wing.parse_named(max_kld or [], "--max-kld"),
        min_decode=min_decode,
        min_prefill=min_prefill,
        min_served=min_served,
        min_accuracy=wing.parse_named(min_accuracy or [], "--min-accuracy"),
        batch=batch,
        context=context,
        backend=backend,
        sort=sort,
        machine=machine,
        recipe=recipe,
    )
    sys.stdout.write(wing.json_text(found) if format == "json" else str(found))
    row = found.choice.line.row if found.choice else None
    if row and not os.path.exists(local(row.artifact.path)):
        print(f"its files are not here: `workbench quantize` of recipe '{row.recipe}' makes them", file=sys.stderr)
    if found.command and found.command.startswith("llama-server") and not shutil.which("llama-server"):
        print("llama-server is not here: it comes with llama.cpp's own releases, not with its binding", file=sys.stderr)
    raise typer.Exit(0 if row else 1)


def cost(
    prices: o.PriceFile,
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    slo: o.Slo = None,
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
    plot: o.CostPlot = None,
    format: o.TextFormat = "terminal",
) -> None:
    """What tokens cost on the machines that were measured and at APIs, by the prices of a file; exit with 1 if nothing
    can be told."""
    import json
    from dataclasses import asdict

    from workbench.report.site.cost_plot import cost_plot
    from workbench.report.site.svg import png, standalone

    check_known("format", format, ["terminal", "json"])
    found = api.cost(prices, stored(rows or [results]), limits=slo or (), machine=machine, recipe=recipe)
    told = {"offers": [asdict(each) for each in found.offers], "assumptions": found.assumptions}
    sys.stdout.write(
        json.dumps(told | {"left_out": found.left_out}, indent=2) + "\n" if format == "json" else str(found)
    )
    if plot is not None and found.offers:
        svg = standalone(cost_plot(found))
        picture = png(svg) if plot.suffix == ".png" else None
        if plot.suffix == ".png" and picture is None:
            raise UserError("a plot as PNG needs resvg-py: pip install resvg-py, or name a file.svg")
        write(plot, svg if picture is None else picture)
    raise typer.Exit(0 if found.offers else 1)


def report(
    rows: o.SomeRows = None,
    results: o.Results = o.RESULTS,
    output: o.Page = Path("report.html"),
    plots: o.Plots = None,
    recipe: o.OnlyRecipe = None,
    machine: o.OnlyMachine = None,
) -> None:
    """Write one self-contained HTML page: a choice under limits, plots, the table, and where the numbers come from."""
    from workbench.home import home
    from workbench.report.site.across import elsewhere
    from workbench.report.site.page import page
    from workbench.report.site.plots import plots as plots_of
    from workbench.report.site.svg import png, standalone
    from workbench.report.verdicts.steps import series_like, series_of, steps_of
    from workbench.worker.backends import serving_command

    places = rows or [results]
    known = stored(places)
    table = api.table(known, machine=machine, recipe=recipe)
    series = series_like(table, series_of(stored(places, everything=True, quiet=True)))
    steps = [step for one in series for step in steps_of(one)]
    others = elsewhere(table, known)
    write(output, page(table, series, steps, others=others, command=lambda row: serving_command(row, str(home()))))
    print(output)
    if plots is None:
        return
    for plot in plots_of(table, series, steps):
        svg = standalone(plot.wide)
        write(plots / f"{plot.name}.svg", svg)
        picture = png(svg)
        if picture is not None:
            write(plots / f"{plot.name}.png", picture)
