"""Which plots a page has, and what each one's marks are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise

from workbench.report import estimates
from workbench.report.estimates import Estimate
from workbench.report.metrics import JUDGED, METRICS
from workbench.report.selection import BASE, pair_of
from workbench.report.site import charts
from workbench.report.site.charts import Mark
from workbench.report.site.svg import NARROW, WHOLE, WIDE, Axis
from workbench.report.site.words import MEMORY_PARTS, engine_word, variant_name
from workbench.report.table import Line, Table
from workbench.report.units import MIB
from workbench.report.verdicts.causes import differing
from workbench.report.verdicts.steps import Series, Step

OWN_PARTS = ("weights", "weights_copied", "kv_cache_reserved", "kv_cache", "workspace", "runtime")
"""What an engine holds at one time; no peaks, which are of different moments and add up to nothing that was there."""
PEAKS = ("peak_rss", "peak_vram")
PEAK_WORDS = tuple(MEMORY_PARTS[part] for part in PEAKS)
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
    key: tuple[str, ...] = ()
    """What its numbers stand for, from 1."""


def plots(table: Table, series: Sequence[Series] = (), steps: Sequence[Step] = ()) -> list[Plot]:
    """Every plot that the rows have the numbers for."""
    words = [engine_word(group) for group in groups_of(table)]
    found: list[Plot] = []

    def add(name: str, title: str, caption: str, draw: Callable[[int], str], key: Sequence[str] = ()) -> None:
        found.append(Plot(name, title, caption, draw(WIDE), draw(NARROW), tuple(key)))

    quality = _quality_of(table)
    size, speed = Axis("size, MiB", MIB, log=True), Axis("decode, tok/s", log=True)
    if len(marks := _points(table, "decode_tok_s", quality, with_size=True)) > 1:
        title = f"{quality.title} against speed and size"
        add(
            "choice",
            title,
            "Further right is faster, further down is closer to the base, a larger point is a larger file; bars are 95 "
            f"% intervals{quality.more}. The dashed line joins what nothing beats in both. A click on a point, or Tab, "
            "arrow keys and Enter, shows its command, versions and bytes.",
            lambda width: charts.scatter(
                marks, words, speed, quality.axis, title, True, WHOLE if width == WIDE else width
            ),
        )
    if len(points := _points(table, "disk_bytes", quality)) > 1:
        title = f"{quality.title} against size"
        add(
            "quality-size",
            title,
            f"Further left is smaller, further down is closer to the base; bars are 95 % intervals{quality.more}.",
            partial(charts.scatter, points, words, size, quality.axis, title, False),
        )
    if marks := _marks(table, memory_parts):
        parts = dict.fromkeys(part for mark in marks for part in mark.values)
        own = [part for part in parts if part not in PEAK_WORDS]
        stacks = [own, *([part] for part in PEAK_WORDS if part in parts)]
        add(
            "memory",
            "Memory",
            "Upper bar: what the engine says it holds, part by part; below it: the most that was seen at one time.",
            partial(charts.bars, marks, words, Axis("MiB", MIB), "Memory by part", list(filter(None, stacks))),
        )
    if marks := _marks(table, latencies):
        add(
            "latency",
            "Time between tokens",
            "Box: the middle half, with the median; whiskers: 5 % to 95 % of all decoding steps of all repeats.",
            partial(charts.spreads, marks, words, Axis("ms", 1e-3, log=True), "Time between tokens"),
        )
    if marks := _marks(table, divergences):
        axis, label = Axis("nats a token", log=True), "Divergence from the base, percentiles"
        add(
            "divergence",
            "Divergence from the base",
            "Percentiles over the scored tokens of the KL divergence from the base's distribution.",
            partial(charts.percentiles, marks, words, axis, label),
        )
    versions = version_steps(series)
    for metric in [name for name, judged in JUDGED.items() if judged.plotted]:
        if curves := _curves(metric, series, steps, table):
            axis, title = _axis(metric), METRICS[metric].title
            days = [days_of(date) for date, _ in versions]
            add(
                f"history-{metric}",
                f"{title[:1].upper()}{title[1:]} over time",
                "A line a variant and engine; a ring marks where a level changed, a numbered line where a version did.",
                partial(charts.over_time, curves, words, axis, f"{axis.label} over time", days),
                [f"{date}: {what}" for date, what in versions],
            )
    return found


def version_steps(series: Sequence[Series]) -> list[tuple[str, str]]:
    """(date, what became what) of every night before which some version changed; commits of this program do nightly."""
    found: dict[str, dict[str, None]] = {}
    for one in series:
        for last, point in pairwise(one.points):
            for name, (old, new) in differing(last.versions, point.versions).items():
                if old and new and name not in ("commit", "reference"):
                    found.setdefault(point.at[:10], {})[f"{name} {old} → {new}"] = None
    return [(date, ", ".join(found[date])) for date in sorted(found)]


def row_ids(table: Table) -> dict[str, str]:
    """Row key -> the id that table and plots have for it."""
    return {line.row.key: f"r{place}" for place, line in enumerate(table.lines)}


def groups_of(table: Table) -> list[str]:
    """The engines, in order; their place is their colour and shape."""
    return list(dict.fromkeys(line.row.backend for line in table.lines))


def memory_parts(line: Line) -> dict[str, float] | None:
    """Bytes by part, in words: what the engine says that it holds, and the most that was seen at one time."""
    memory = line.row.measurement.memory if line.row.measurement else {}
    # What was reserved for the KV cache is there, whatever of it is used.
    own = [part for part in OWN_PARTS if part != "kv_cache" or not memory.get("kv_cache_reserved")]
    return {MEMORY_PARTS[part]: float(memory[part]) for part in (*own, *PEAKS) if memory.get(part)} or None


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
    """Days since 1970 of a row's time, or of the beginning of a date."""
    return datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp() / 86400


def _marks(table: Table, values: Callable[[Line], dict[str, float] | None]) -> list[Mark]:
    ids, groups = row_ids(table), groups_of(table)
    return [
        Mark(
            ids[line.row.key],
            variant_name(table, line) + (f" · {engine_word(line.row.backend)}" if len(groups) > 1 else ""),
            groups.index(line.row.backend),
            values=found,
        )
        for line in table.lines
        if (found := values(line))
    ]


@dataclass(frozen=True)
class Quality:
    """What plots show as quality: the divergence from the base, or where there is none the paired perplexity."""

    title: str
    axis: Axis
    estimate: Callable[[Line], Estimate | None]
    more: str = ""


def _quality_of(table: Table) -> Quality:
    def divergence(line: Line) -> Estimate | None:
        value = line.values["kld_mean"]
        windows = len(line.row.quality["windows"]) if line.row.quality else 0
        return None if value is None else Estimate(value, line.errors["kld_mean"], windows)

    if sum(divergence(line) is not None for line in table.lines) > 1:
        axis = Axis("divergence from the base (KLD), nats a token", log=True)
        return Quality("Divergence from the base", axis, divergence, "; what is exactly 0 stands at the lower edge")
    axis = Axis("perplexity more than the base's", log=True)
    return Quality("Perplexity lost", axis, lambda line: line.delta, ", paired; what is not above 0 stands at the edge")


def _points(table: Table, metric: str, quality: Quality, with_size: bool = False) -> list[Mark]:
    ids, groups = row_ids(table), groups_of(table)
    found = []
    for line in table.lines:
        x, y = line.values[metric], quality.estimate(line)
        if x is None or y is None:
            continue
        found.append(
            Mark(
                ids[line.row.key],
                # Engines are told by colour and shape: names are for variants.
                variant_name(table, line),
                groups.index(line.row.backend),
                x,
                y.value,
                (line.values["disk_bytes"] or 0.0) if with_size else 0.0,
                line.intervals.get(metric),
                estimates.interval(y) if y.se else None,
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
                name=one.label.replace(f" on {one.pair.backend}", f" {engine_word(one.pair.backend)}", 1),
                group=groups.index(one.pair.backend),
                points=tuple((days_of(p.at), value, p.at[:10]) for p, value in points),
                steps=tuple((days_of(s.first.at), s.after, f"{s.relative:+.1%} since {s.first.at[:10]}") for s in own),
            )
        )
    found.sort(key=lambda curve: not curve.steps)
    return found[:MOST_CURVES]
