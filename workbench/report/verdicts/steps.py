"""The same job over many nights: series, and the steps in them.

A series is one variant on one engine, one machine, one evaluation and one way of measuring. A step is where its
level changed, not a single noisy point: the median of up to seven points before differs from that of up to seven,
at least three, after it, by more than a size that matters and by more than four standard errors of such a
difference, the noise taken from the whole series' night-to-night changes (their median, which steps do not move).
Among neighbouring places the one is taken that leaves the least absolute deviation from the two medians.

Rejected: binary segmentation by means (a regression that was mended a week later leaves both halves alike), and
asv's optimal partitioning (quadratic in the number of nights, and its penalty has no unit a person could choose).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.records import Row
from workbench.report import quality
from workbench.report.metrics import JUDGED, METRICS
from workbench.report.selection import Pair, evaluation_digest, labels_of, pair_of
from workbench.report.store import machine_of
from workbench.report.table import Table
from workbench.report.verdicts.causes import differing, grouped, known_versions

WINDOW = 7
"""Points on each side that a level is read from."""
AFTER = 3
"""Points that a new level needs to be one."""
ERRORS = 4.0
"""Standard errors that a step must have."""


@dataclass(frozen=True)
class SeriesPoint:
    """One night of a series: what the row says, as numbers."""

    at: str
    values: dict[str, float]
    """Values by metric, as far as they were measured."""
    versions: dict[str, str]
    error: str | None

    @property
    def commit(self) -> str:
        return self.versions.get("commit", "")


@dataclass(frozen=True)
class Series:
    """One variant on one engine over time, oldest first."""

    machine: str
    recipe: str
    pair: Pair
    evaluation: str
    measurement_version: int
    points: tuple[SeriesPoint, ...]
    label: str = ""
    """What people read: variant and engine, and which options differ where a recipe has several."""

    def values(self, metric: str) -> list[tuple[SeriesPoint, float]]:
        """The points that have the metric."""
        return [(point, point.values[metric]) for point in self.points if metric in point.values]


@dataclass(frozen=True)
class Step:
    """A change of level, and what changed with it."""

    series: Series
    metric: str
    before: float
    """The level: a median."""
    after: float
    last: SeriesPoint
    """The last night of the old level."""
    first: SeriesPoint
    """The first night of the new one: here it began."""
    worse: bool
    open: bool
    """Whether the newest nights are still at least as far from the old level as matters."""

    @property
    def relative(self) -> float:
        return self.after / self.before - 1

    @property
    def changed(self) -> dict[str, tuple[str, str]]:
        """The versions (and the commit, and the driver) that differ between the two nights."""
        return differing(self.last.versions, self.first.versions)


def series_of(rows: Sequence[Row]) -> list[Series]:
    """Every series of the rows of `store.history`, in the order first seen."""
    found: dict[tuple[str, str, Pair, str, int], list[Row]] = {}
    for row in rows:
        if row.unsupported:
            continue
        name = (machine_of(row), row.recipe, pair_of(row), evaluation_digest(row), row.measurement_version)
        found.setdefault(name, []).append(row)
    kinds: dict[tuple[str, str], dict[Pair, Row]] = {}
    for (machine, recipe, pair, *_), group in found.items():
        kinds.setdefault((machine, recipe), {})[pair] = group[-1]
    labels = {kind: labels_of(pairs) for kind, pairs in kinds.items()}
    return [
        Series(
            *name,
            points=tuple(point_of(row) for row in sorted(group, key=lambda row: row.started_at)),
            label=labels[name[:2]][name[2]],
        )
        for name, group in found.items()
    ]


def series_like(table: Table, series: Sequence[Series]) -> list[Series]:
    """The series that a table's lines are the latest points of."""
    pairs = {pair_of(line.row) for line in table.lines}
    versions = {line.row.measurement_version for line in table.lines}
    digest = table.first.evaluation.digest if table.first.evaluation else ""
    return [
        one
        for one in series
        if one.machine == table.machine
        and one.pair in pairs
        and one.measurement_version in versions
        and one.evaluation in (digest, "")
    ]


def by_cause(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps of one night, machine and engine together, the newest night first; of each, metric by metric."""
    order = {name: place for place, name in enumerate(JUDGED)}
    ordered = sorted(steps, key=lambda step: order[step.metric])
    groups = grouped(ordered, lambda step: (step.first.at[:10], step.series.machine, step.series.pair.backend))
    return sorted(groups, key=lambda group: group[0].first.at[:10], reverse=True)


def point_of(row: Row) -> SeriesPoint:
    """A row as a point of its series."""
    values = {}
    if row.measurement:
        for name in JUDGED:
            value = METRICS[name].value(row)
            if value is not None and value > 0:
                values[name] = value
    # The reference is a version of nothing, but where it changed, divergences are not comparable.
    reference = quality.reference(row)
    versions = known_versions(row) | ({} if reference is None else {"reference": reference})
    return SeriesPoint(row.started_at, values, versions, row.error)


def steps_of(series: Series) -> list[Step]:
    """The steps of every metric of a series, oldest first."""
    found = []
    for metric, judged in JUDGED.items():
        threshold = judged.threshold
        measured = series.values(metric)
        values = [value for _, value in measured]
        for place in find_steps(values, threshold):
            before, after = levels(values, place)
            better = METRICS[metric].better
            now = statistics.median(values[-AFTER:])
            worse = (after > before) == (better == "lower")
            still = (now / before - 1) * (1 if after > before else -1) >= threshold * 0.999
            found.append(
                Step(series, metric, before, after, measured[place - 1][0], measured[place][0], worse, worse and still)
            )
    return sorted(found, key=lambda step: step.first.at)


def levels(values: Sequence[float], place: int) -> tuple[float, float]:
    """The medians of the points before and from a place."""
    return statistics.median(values[max(0, place - WINDOW) : place]), statistics.median(values[place : place + WINDOW])


def find_steps(values: Sequence[float], threshold: float) -> list[int]:
    """The indices at which a new level begins; `values` are positive, `threshold` is relative."""
    if len(values) < 2 * AFTER or max(values) < min(values) * (1 + threshold):
        return []
    logs = [math.log(value) for value in values]
    changes = [abs(b - a) for a, b in zip(logs, logs[1:], strict=False)]
    # The median of |N(0, 2 s^2)| is 0.6745 sqrt(2) s.
    noise = statistics.median(changes) / (0.6745 * math.sqrt(2))
    least = math.log1p(threshold)
    jumps: dict[int, float] = {}
    for place in range(AFTER, len(logs) - AFTER + 1):
        left, right = logs[max(0, place - WINDOW) : place], logs[place : place + WINDOW]
        level, other = statistics.median(left), statistics.median(right)
        jump = abs(other - level)
        if abs(logs[place] - other) > abs(logs[place] - level):
            continue  # the new level has not begun: two later nights make this median
        # A median's error is sqrt(pi / 2) of a mean's.
        error = noise * math.sqrt(math.pi / 2 * (1 / len(left) + 1 / len(right)))
        if jump >= least * 0.999 and jump > ERRORS * error:
            jumps[place] = jump
    found: list[int] = []
    cluster: list[int] = []
    for place in [*jumps, -1]:
        if cluster and place != cluster[-1] + 1:
            best = min(cluster, key=lambda k: _deviation(logs, k, cluster[0], cluster[-1]))
            if not found or best - found[-1] >= AFTER:
                found.append(best)
            cluster = []
        cluster.append(place)
    return found


def _deviation(logs: Sequence[float], place: int, first: int, last: int) -> float:
    """Summed distance of all points around a cluster from the level of their side."""
    left, right = logs[max(0, first - WINDOW) : place], logs[place : last + WINDOW]
    levels = statistics.median(left), statistics.median(right)
    return math.fsum(abs(x - levels[0]) for x in left) + math.fsum(abs(x - levels[1]) for x in right)
