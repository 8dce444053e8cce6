"""The columns of a page's table: first the few that a choice needs, quality beside speed; the others are there to be
asked for: every metric that has a `Column`, further lengths and batches, further evaluation sets, tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from workbench.report.metrics import METRICS, Column, Metric
from workbench.report.selection import BASE
from workbench.report.table import Line, Score, Table, workload

FIRST = ("disk_bytes", "peak_vram_bytes", "peak_rss_bytes", "decode_tok_s", "kld_mean", "perplexity_delta")
"""The columns that everybody sees, as far as they were measured: in this order, before all others."""
PHONE = ("disk_bytes", "decode_tok_s", "kld_mean")
"""Those of them for which a phone has room."""
SHORTHAND = "pp512: tokens a second of a prompt of 512; tg64 @ d512: of 64 new ones after it; b8: 8 at once; 95 %"


@dataclass(frozen=True)
class PageColumn:
    """A column of numbers: what it shows, and its error beside it."""

    name: str
    """What the page's address calls it."""
    heading: str
    unit: str
    best: Literal["high", "low"]
    """What a first click on its heading brings up."""
    value: Callable[[Line], float | None]
    show: Callable[[float], str]
    error: Callable[[Line], str]
    help: str
    shown: Literal["always", "wide", "asked"] = "asked"
    """Whether it is seen unasked: on phones too, where there is room, not at all."""


def columns(table: Table) -> list[PageColumn]:
    """The columns of numbers that any line has."""
    workloads = {workload(line.row) for line in table.lines}
    spoken = "the first length and batch"
    if len(workloads) == 1:
        spoken = "{} prompt tokens, {} new ones, batch {}".format(*workloads.pop())
    found = [_of_metric(metric, metric.column, spoken) for metric in METRICS.values() if metric.column]
    found.append(_perplexity_delta())
    for name in [*table.sets][1:]:
        found += [_on_set(column, name, table) for column in found if column.name in OF_A_SET]
    found += [_further(name) for name in dict.fromkeys(name for line in table.lines for name in line.further)]
    for name in dict.fromkeys(name for line in table.lines for name in line.tasks):
        found += [_task(name), _task_delta(name)]
    found = [column for column in found if any(column.value(line) is not None for line in table.lines)]
    found.sort(key=lambda column: FIRST.index(column.name) if column.name in FIRST else len(FIRST))
    return [replace(column, shown=_shown(column.name, {each.name for each in found})) for column in found]


OF_A_SET = ("perplexity", "perplexity_delta", "kld_mean", "top1_agreement")
"""The columns that each further evaluation set has too."""


def _shown(name: str, known: set[str]) -> Literal["always", "wide", "asked"]:
    if "kld_mean" not in known and name in ("perplexity", "perplexity_delta"):
        return "always"
    if name == "peak_rss_bytes" and "peak_vram_bytes" in known:
        return "asked"
    return "always" if name in PHONE else "wide" if name in FIRST else "asked"


def _of_metric(metric: Metric, column: Column, spoken: str) -> PageColumn:
    def show(value: float) -> str:
        return format(value / column.scale, column.spec)

    def error(line: Line) -> str:
        interval, se = line.intervals.get(metric.name), line.errors.get(metric.name)
        return f"{show(interval[0])}–{show(interval[1])}" if interval else "" if se is None else f"±{show(se)}"

    best: Literal["high", "low"] = "high" if metric.better == "higher" else "low"
    help = column.help.format(workload=spoken)
    return PageColumn(
        metric.name, column.heading, column.unit, best, lambda line: line.values[metric.name], show, error, help
    )


def _perplexity_delta() -> PageColumn:
    def error(line: Line) -> str:
        mark = "~ " if line.below_noise_floor and line.row.artifact.method != BASE else ""
        return (mark + (f"±{line.delta.se:.3f}" if line.delta and line.delta.se else "")).strip()

    return PageColumn(
        "perplexity_delta",
        "Δ perplexity",
        "",
        "low",
        lambda line: line.delta.value if line.delta else None,
        lambda value: f"{value:+.3f}" if value else "0",
        error,
        "To the base on the same engine, paired; ~ is not to be told from the base",
    )


def _on_set(column: PageColumn, name: str, table: Table) -> PageColumn:
    """The same column on another evaluation set of the recipe."""
    lines = {line.row.key: line for line in table.sets[name].lines}
    return replace(
        column,
        name=f"{column.name}.{name}",
        heading=f"{column.heading}, {name}",
        value=lambda line: column.value(lines[line.row.key]),
        error=lambda line: column.error(lines[line.row.key]),
    )


def _further(name: str) -> PageColumn:
    """A speed at another length or batch, or of requests served together."""

    def error(line: Line) -> str:
        found = line.further.get(name)
        return "{:.1f}–{:.1f}".format(*found.interval) if found and found.interval else ""

    return PageColumn(
        name,
        name,
        "tok/s",
        "high",
        lambda line: found.median if (found := line.further.get(name)) else None,
        lambda value: f"{value:.1f}",
        error,
        "New tokens a second of requests served together; 95 %" if name.startswith("served") else SHORTHAND,
    )


def _task(name: str) -> PageColumn:
    def error(line: Line) -> str:
        low, high = line.tasks[name].interval
        return f"{100 * low:.1f} to {100 * high:.1f}"

    return PageColumn(
        name,
        name,
        "%",
        "high",
        lambda line: line.tasks[name].accuracy.value if name in line.tasks else None,
        lambda value: f"{100 * value:.1f}",
        error,
        "Share of items answered rightly; 95 % interval",
    )


def _task_delta(name: str) -> PageColumn:
    def score(line: Line) -> Score | None:
        return line.tasks.get(name)

    def error(line: Line) -> str:
        found = score(line)
        if found is None or found.delta_interval is None or line.row.artifact.method == BASE:
            return ""
        low, high = found.delta_interval
        return f"{'~ ' if found.below_noise_floor else ''}{100 * low:+.1f} to {100 * high:+.1f}"

    return PageColumn(
        f"{name}.delta",
        f"Δ {name}",
        "%",
        "high",
        lambda line: found.delta.value if (found := score(line)) and found.delta else None,
        lambda value: f"{100 * value:+.1f}" if value else "0",
        error,
        "To the base on the same engine, paired by item; 95 % interval; ~ may be none",
    )
