"""Which plots a page has, and what each one's marks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from workbench.report import estimates
from workbench.report.metrics import JUDGED, METRICS
from workbench.report.selection import BASE, pair_of
from workbench.report.site import charts
from workbench.report.site.charts import Mark
from workbench.report.site.svg import NARROW, WIDE, Axis
from workbench.report.table import Line, Table
from workbench.report.units import MIB
from workbench.report.verdicts.steps import Series, Step

HOST_PARTS = ("peak_rss_anon", "peak_rss_file", "peak_rss_shared")
NOT_PARTS = ("peak_rss", "peak_vram", *HOST_PARTS)
MOST_CURVES = 40
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
    groups = groups_of(table)
    found: list[Plot] = []

    def add(name: str, title: str, caption: str, draw: Callable[[int], str]) -> None:
        found.append(Plot(name, title, caption, draw(WIDE), draw(NARROW)))

    for name, where, metric, axis, label in (
        ("size", "left", "disk_bytes", Axis("size, MiB", MIB, log=True), "Perplexity against size"),
        ("speed", "right", "decode_tok_s", Axis("decode, tok/s", log=True), "Perplexity against speed"),
    ):
        marks = _scatter_marks(table, metric)
        if len(marks) > 1:
            add(
                f"quality-{name}",
                f"Quality against {name}",
                f"Lower and further {where} is better; the dashed line joins what nothing beats in both. Bars: 95 %.",
                partial(charts.scatter, marks, groups, axis, Axis("perplexity", log=True), label, where == "right"),
            )
    if marks := _marks(table, memory_parts):
        parts = dict.fromkeys(part for mark in marks for part in mark.values)
        stacks = [[part for part in parts if part not in HOST_PARTS], [part for part in HOST_PARTS if part in parts]]
        add(
            "memory",
            "Memory by part",
            "Upper bar: what the engine says of its own; lower bar: the host memory of its processes at their peak.",
            partial(charts.bars, marks, groups, Axis("MiB", MIB), "Memory by part", list(filter(None, stacks))),
        )
    if marks := _marks(table, latencies):
        add(
            "latency",
            "Time between tokens",
            "Box: the middle half, with the median; whiskers: 5 % to 95 % of all decoding steps of all repeats.",
            partial(charts.spreads, marks, groups, Axis("ms", 1e-3, log=True), "Time between tokens"),
        )
    if marks := _marks(table, divergences):
        axis, label = Axis("nats a token", log=True), "Divergence from the base, percentiles"
        add(
            "divergence",
            "Divergence from the base",
            "Percentiles over the scored tokens of the KL divergence from the base's distribution.",
            partial(charts.percentiles, marks, groups, axis, label),
        )
    for metric in [name for name, judged in JUDGED.items() if judged.plotted]:
        if curves := _curves(metric, series, steps, table):
            axis, title = _axis(metric), METRICS[metric].title
            add(
                f"history-{metric}",
                f"{title[:1].upper()}{title[1:]} over time",
                "A line a variant and engine; a ring marks where a level changed.",
                partial(charts.over_time, curves, groups, axis, f"{axis.label} over time"),
            )
    return found


def row_ids(table: Table) -> dict[str, str]:
    """Row key -> the id that table and plots have for it."""
    return {line.row.key: f"r{place}" for place, line in enumerate(table.lines)}


def groups_of(table: Table) -> list[str]:
    """The engines, in order; their place is their colour and shape."""
    return list(dict.fromkeys(line.row.backend for line in table.lines))


def memory_parts(line: Line) -> dict[str, float] | None:
    """Bytes by part: what the engine says of its own, and what its processes hold on the host."""
    memory = line.row.measurement.memory if line.row.measurement else {}
    own = {k: float(v) for k, v in memory.items() if v and k not in NOT_PARTS and not k.startswith("peak")}
    host = {part: float(memory[part]) for part in HOST_PARTS if memory.get(part)}
    return own | host or None


def latencies(line: Line) -> dict[str, float] | None:
    """Percentiles of the seconds of all decoding steps at the first workload point; None for fewer than five."""
    speeds = line.row.measurement.speeds if line.row.measurement else []
    steps = sorted(step for repeat in (speeds[0].step_s if speeds else []) for step in repeat)
    if len(steps) < 5:
        return None
    return {f"p{p}": estimates.quantile(steps, p / 100) for p in (5, 25, 50, 75, 95)}


def divergences(line: Line) -> dict[str, float] | None:
    """Percentiles of the divergence, in nats a token."""
    if line.row.artifact.method == BASE:
        return None
    names = {"median": "kld_p50", "90 %": "kld_p90", "99 %": "kld_p99", "99.9 %": "kld_p999", "maximum": "kld_max"}
    return {shown: value for shown, name in names.items() if (value := line.values[name])} or None


def days_of(at: str) -> float:
    """Days since 1970 of a row's time."""
    return datetime.fromisoformat(at).timestamp() / 86400


def _name(table: Table, line: Line) -> str:
    """The variant, and what else tells a line from another of its variant and engine."""
    return " · ".join(filter(None, [line.row.artifact.variant, *(column.text(line.row) for column in table.varying)]))


def _marks(table: Table, values: Callable[[Line], dict[str, float] | None]) -> list[Mark]:
    ids, groups = row_ids(table), groups_of(table)
    return [
        Mark(
            ids[line.row.key],
            _name(table, line) + (f" · {line.row.backend}" if len(groups) > 1 else ""),
            groups.index(line.row.backend),
            values=found,
        )
        for line in table.lines
        if (found := values(line))
    ]


def _scatter_marks(table: Table, metric: str) -> list[Mark]:
    ids, groups = row_ids(table), groups_of(table)
    found = []
    for line in table.lines:
        x, y = line.values[metric], line.values["perplexity"]
        if x is None or y is None:
            continue
        windows = len(line.row.quality["windows"]) if line.row.quality else 0
        spread = estimates.interval(estimates.Estimate(y, line.errors["perplexity"] or None, windows))
        found.append(
            Mark(
                ids[line.row.key],
                # Engine names stay in the legend and the tooltip: labels are for variants.
                _name(table, line),
                groups.index(line.row.backend),
                x,
                y,
                line.intervals.get(metric),
                spread if spread and spread[0] > 0 else None,
            )
        )
    return found


def _axis(metric: str) -> Axis:
    title, unit = METRICS[metric].title, METRICS[metric].unit
    if unit == "B":
        return Axis(f"{title}, MiB", MIB, log=True)
    return Axis(f"{title}, {unit}" if unit else title, log=True)


def _curves(metric: str, series: Sequence[Series], steps: Sequence[Step], table: Table) -> list[charts.Curve]:
    ids, groups = row_ids(table), groups_of(table)
    latest = {pair_of(line.row): ids[line.row.key] for line in table.lines}
    found = []
    for one in series:
        points = one.values(metric)
        if len(points) < 2 or one.pair.backend not in groups:
            continue
        own = [step for step in steps if step.metric == metric and step.series is one]
        found.append(
            charts.Curve(
                row=latest.get(one.pair, ""),
                name=one.label.replace(" on ", " ", 1),
                group=groups.index(one.pair.backend),
                points=tuple((days_of(p.at), value, p.at[:10]) for p, value in points),
                steps=tuple((days_of(s.first.at), s.after, f"{s.relative:+.1%} since {s.first.at[:10]}") for s in own),
            )
        )
    found.sort(key=lambda curve: not curve.steps)
    return found[:MOST_CURVES]
