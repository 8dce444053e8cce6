"""The columns of a page's table: every metric that has a `Column`, then further evaluation sets and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from workbench.report.metrics import METRICS, Column, Metric
from workbench.report.selection import BASE
from workbench.report.table import Line, Table, workload


@dataclass(frozen=True)
class PageColumn:
    """A column of numbers: what it shows, and its error beside it."""

    heading: str
    unit: str
    value: Callable[[Line], float | None]
    show: Callable[[float], str]
    error: Callable[[Line], str]
    help: str


def columns(table: Table) -> list[PageColumn]:
    """The columns of numbers that any line has."""
    workloads = {workload(line.row) for line in table.lines}
    spoken = "see the workload"
    if len(workloads) == 1:
        spoken = "{} prompt tokens, {} new ones, batch {}".format(*workloads.pop())
    by_name = {metric.name: _of_metric(metric, metric.column, spoken) for metric in METRICS.values() if metric.column}
    found = []
    for name, column in by_name.items():
        found += [column, _perplexity_delta()] if name == "perplexity" else [column]
    found += [_on_set(by_name["perplexity"], name, table) for name in [*table.sets][1:]]
    found += [_task(name) for name in dict.fromkeys(name for line in table.lines for name in line.tasks)]
    return [column for column in found if any(column.value(line) is not None for line in table.lines)]


def _of_metric(metric: Metric, column: Column, spoken: str) -> PageColumn:
    def show(value: float) -> str:
        return format(value / column.scale, column.spec)

    def error(line: Line) -> str:
        interval, se = line.intervals.get(metric.name), line.errors.get(metric.name)
        return f"{show(interval[0])}–{show(interval[1])}" if interval else "" if se is None else f"±{show(se)}"

    help = column.help.format(workload=spoken)
    return PageColumn(column.heading, column.unit, lambda line: line.values[metric.name], show, error, help)


def _perplexity_delta() -> PageColumn:
    def error(line: Line) -> str:
        mark = "~ " if line.below_noise_floor and line.row.artifact.method != BASE else ""
        return (mark + (f"±{line.delta.se:.3f}" if line.delta and line.delta.se else "")).strip()

    return PageColumn(
        "Δ perplexity",
        "",
        lambda line: line.delta.value if line.delta else None,
        lambda value: f"{value:+.3f}",
        error,
        "To the base on the same engine, paired; ~ is not to be told from the base",
    )


def _on_set(column: PageColumn, name: str, table: Table) -> PageColumn:
    """The same column on another evaluation set of the recipe."""
    lines = {line.row.key: line for line in table.sets[name].lines}
    return replace(
        column,
        heading=f"{column.heading}, {name}",
        value=lambda line: column.value(lines[line.row.key]),
        error=lambda line: column.error(lines[line.row.key]),
    )


def _task(name: str) -> PageColumn:
    def error(line: Line) -> str:
        low, high = line.tasks[name].interval
        return f"{100 * low:.1f} to {100 * high:.1f}"

    return PageColumn(
        name,
        "%",
        lambda line: line.tasks[name].accuracy.value if name in line.tasks else None,
        lambda value: f"{100 * value:.1f}",
        error,
        "Share of items answered rightly; 95 % interval",
    )
