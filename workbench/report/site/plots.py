"""Which plots a page has, and what each one's marks are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from workbench.report import estimates as statistics
from workbench.report import selection
from workbench.report.metrics import JUDGED, METRICS
from workbench.report.selection import BASE
from workbench.report.site import charts
from workbench.report.site.charts import Mark
from workbench.report.site.svg import NARROW, WIDE, Axis
from workbench.report.table import Line, Table
from workbench.report.units import MIB
from workbench.report.verdicts.steps import Series, Step

HOST_PARTS = ("peak_rss_anon", "peak_rss_file", "peak_rss_shared")
NOT_PARTS = ("peak_rss", "peak_vram", *HOST_PARTS)
MOST_LINES = 40
"""Series in one plot over time."""


@dataclass(frozen=True)
class Plot:
    """A plot in two widths."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


def plots(table: Table, series: Sequence[Series] = (), steps: Sequence[Step] = ()) -> list[Plot]:
    """Every plot that the rows have the numbers for."""
    ids = row_ids(table)
    groups = groups_of(table)
    found: list[Plot] = []

    def marks(values: Callable[[Line], dict[str, float] | None]) -> list[Mark]:
        made = []
        for line in table.lines:
            found = values(line)
            if found:
                made.append(_mark(line, ids, groups, table, values=found))
        return made

    def add(name: str, title: str, caption: str, draw: Callable[[int], str]) -> None:
        found.append(Plot(name, title, caption, draw(WIDE), draw(NARROW)))

    quality = Axis("perplexity", log=True)
    size = _scatter_marks(table, ids, groups, "disk_bytes", None)
    if len(size) > 1:
        add(
            "quality-size",
            "Quality against size",
            "Lower and further left is better; the dashed line joins what nothing beats in both. Bars: 95 %.",
            lambda width: charts.scatter(
                size, groups, Axis("size, MiB", MIB, log=True), quality, "Perplexity against size", width, False
            ),
        )
    speed = _scatter_marks(table, ids, groups, "decode_tok_s", lambda line: line.intervals["decode_tok_s"])
    if len(speed) > 1:
        add(
            "quality-speed",
            "Quality against speed",
            "Lower and further right is better; the dashed line joins what nothing beats in both. Bars: 95 %.",
            lambda width: charts.scatter(
                speed, groups, Axis("decode, tok/s", log=True), quality, "Perplexity against speed", width, True
            ),
        )
    memory = marks(memory_parts)
    if memory:
        own = list(dict.fromkeys(part for mark in memory for part in mark.values if part not in HOST_PARTS))
        stacks = [stack for stack in (own, list(HOST_PARTS)) if any(part in m.values for m in memory for part in stack)]
        add(
            "memory",
            "Memory by part",
            "Upper bar: what the engine says of its own; lower bar: the host memory of its processes at their peak.",
            lambda width: charts.bars(memory, groups, Axis("MiB", MIB), "Memory by part", width, stacks),
        )
    latency = marks(latencies)
    if latency:
        add(
            "latency",
            "Time between tokens",
            "Box: the middle half, with the median; whiskers: 5 % to 95 % of all decoding steps of all repeats.",
            lambda width: charts.spreads(latency, groups, Axis("ms", 1e-3, log=True), "Time between tokens", width),
        )
    divergence = marks(divergences)
    if divergence:
        add(
            "divergence",
            "Divergence from the base",
            "Percentiles over the scored tokens of the KL divergence from the base's distribution.",
            lambda width: charts.percentiles(
                divergence, groups, Axis("nats a token", log=True), "Divergence from the base, percentiles", width
            ),
        )
    for metric in [name for name, judged in JUDGED.items() if judged.plotted]:
        lines = _history(metric, series, steps, ids, groups, table)
        if lines:
            axis = _axis(metric)
            add(
                f"history-{metric}",
                _sentence(f"{METRICS[metric].title} over time"),
                "A line a variant and engine; a ring marks where a level changed.",
                partial(charts.lines, lines, groups, axis, f"{axis.label} over time"),
            )
    return found


def row_ids(table: Table) -> dict[str, str]:
    """Row key -> the id that table and plots have for it."""
    return {line.row.key: f"r{place}" for place, line in enumerate(table.lines)}


def groups_of(table: Table) -> list[str]:
    """The engines, in order; their place is their colour and shape."""
    return list(dict.fromkeys(line.row.backend for line in table.lines))


def memory_parts(line: Line) -> dict[str, float] | None:
    """Bytes: what the engine says of its own parts, and the host's of its processes."""
    memory = line.row.measurement.memory if line.row.measurement else {}
    own = {k: float(v) for k, v in memory.items() if k not in NOT_PARTS and is_count(v) and not k.startswith("peak")}
    host = {part: float(memory[part]) for part in HOST_PARTS if is_count(memory.get(part))}
    return own | host or None


def latencies(line: Line) -> dict[str, float] | None:
    """Percentiles of the seconds of all decoding steps at the first workload point; None for fewer than five."""
    speeds = line.row.measurement.speeds if line.row.measurement else []
    steps = sorted(step for repeat in (speeds[0].step_s if speeds else []) for step in repeat if is_count(step))
    if len(steps) < 5:
        return None
    return {f"p{p}": statistics.quantile(steps, p / 100) for p in (5, 25, 50, 75, 95)}


def divergences(line: Line) -> dict[str, float] | None:
    """Percentiles of the divergence, in nats a token."""
    if line.row.artifact.method == BASE:
        return None
    names = {"median": "kld_p50", "90 %": "kld_p90", "99 %": "kld_p99", "99.9 %": "kld_p999", "maximum": "kld_max"}
    return {shown: value for shown, name in names.items() if (value := line.values[name])} or None


def days_of(at: str) -> float:
    """Days since 1970 of a row's time; 0 if it cannot be read."""
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() / 86400


def _mark(line: Line, ids: dict[str, str], groups: Sequence[str], table: Table, **more: Any) -> Mark:
    name = " · ".join([line.row.artifact.variant, *_details(table, line)])
    if len(groups) > 1:
        name += f" · {line.row.backend}"
    return Mark(ids[line.row.key], name, groups.index(line.row.backend), **more)


def _details(table: Table, line: Line) -> list[str]:
    """What else tells a line from another of its variant and engine."""
    return [text for column in table.varying if (text := column.text(line.row))]


def _scatter_marks(
    table: Table,
    ids: dict[str, str],
    groups: Sequence[str],
    name: str,
    interval: Callable[[Line], tuple[float, float] | None] | None,
) -> list[Mark]:
    found = []
    for line in table.lines:
        x, y = line.values[name], line.values["perplexity"]
        if x is None or y is None:
            continue
        error = line.errors["perplexity"]
        windows = len(line.row.quality["windows"]) if line.row.quality else 0
        spread = statistics.interval(statistics.Estimate(y, error, windows)) if error and windows > 1 else None
        if spread and spread[0] <= 0:
            spread = None
        mark = _mark(
            line, ids, groups, table, x=x, y=y, x_interval=interval(line) if interval else None, y_interval=spread
        )
        # Engine names stay in the legend and the tooltip: labels are for variants.
        found.append(replace(mark, name=" · ".join([line.row.artifact.variant, *_details(table, line)])))
    return found


def _axis(metric: str) -> Axis:
    known = METRICS[metric]
    if known.unit == "B":
        return Axis(f"{known.title}, MiB", MIB, log=True)
    return Axis(f"{known.title}{', ' if known.unit else ''}{known.unit}", log=True)


def _history(
    metric: str,
    series: Sequence[Series],
    steps: Sequence[Step],
    ids: dict[str, str],
    groups: Sequence[str],
    table: Table,
) -> list[charts.Line]:
    latest = {selection.pair_of(line.row): ids[line.row.key] for line in table.lines}
    found = []
    for one in series:
        points = one.values(metric)
        if len(points) < 2 or one.pair.backend not in groups:
            continue
        own = [step for step in steps if step.metric == metric and step.series is one]
        found.append(
            charts.Line(
                row=latest.get(one.pair, ""),
                name=one.label.replace(" on ", " ", 1),
                group=groups.index(one.pair.backend),
                points=tuple((days_of(p.at), value, p.at[:10]) for p, value in points),
                steps=tuple((days_of(s.first.at), s.after, f"{s.relative:+.1%} since {s.first.at[:10]}") for s in own),
            )
        )
    found.sort(key=lambda line: not line.steps)
    return found[:MOST_LINES]


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
