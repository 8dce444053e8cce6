"""Which of several candidates goes before another, by speed, quality, memory and size.

They are ranked by what is sure of them: the lower end of a speed's 95 % interval, the upper end of a divergence's (of a
perplexity where there is no divergence). So a bad measurement is no merit, where in a ranking by medians whatever
overlaps the best would tie with it. Two that differ by less than what matters (`metrics.JUDGED`) are alike, and the
next of the four decides; but whatever is decisively worse than any other, paired where both were scored on the same
tokens, is not alike with the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workbench.records import Row
from workbench.report import estimates, quality
from workbench.report.metrics import JUDGED
from workbench.report.quality import Noise
from workbench.report.table import Table
from workbench.report.verdicts.limits import Candidate, divergence, memory_bytes, untold
from workbench.report.verdicts.wish import ORDERS

TOLERANCE = 0.01
"""Relative difference below which two memories or sizes are alike."""


@dataclass(frozen=True)
class Scale:
    """What candidates are compared by."""

    noise: Mapping[str, Noise]
    """What engines alone make, by base, as far as it is known."""
    one_base: bool = True
    """Whether all are of one base: how far two are from bases of their own says nothing."""

    def noise_of(self, row: Row) -> Noise:
        return self.noise.get(row.base, Noise())


def scale_of(table: Table) -> Scale:
    """The scale of a table's candidates."""
    noise = {floor.base: floor.noise for floor in table.first.noise_floors}
    return Scale(noise, len({line.row.base for line in table.lines}) == 1)


class Sure(NamedTuple):
    """What is sure of a candidate; smaller is better."""

    kind: int
    """Only values of one kind are compared: 0 with an error, 1 without one or of another quantity, 2 not measured."""
    value: float
    slack: float
    """How much more is alike."""


def sure(one: Candidate, by: str, scale: Scale) -> Sure:
    """What is sure of a candidate's speed, quality, memory or size."""
    line, own = one.line, scale.noise_of(one.line.row)
    if by == "speed":
        if one.decode is None:
            return Sure(2, 0.0, 0.0)
        least = one.decode.interval[0] if one.decode.interval else one.decode.median
        return Sure(0 if one.decode.interval else 1, -least, least * JUDGED["decode_tok_s"].threshold)
    if by == "quality":
        perplexity = line.values["perplexity"]
        if perplexity is None or untold(line):
            return Sure(2, 0.0, 0.0)
        found = divergence(line) if scale.one_base else None
        if found is None:
            ends = estimates.interval(line.delta) if line.delta else None
            most = perplexity + (ends[1] - line.delta.value if ends and line.delta else 0.0)
            return Sure(1, most, max(most * JUDGED["perplexity"].threshold, own.perplexity or 0.0))
        most = (estimates.interval(found) or (0.0, found.value))[1]
        return Sure(0, most, max(most * JUDGED["kld_mean"].threshold, own.divergence or 0.0))
    value = memory_bytes(line) if by == "memory" else line.values["disk_bytes"]
    return Sure(2, 0.0, 0.0) if value is None else Sure(0, value, value * TOLERANCE)


def worse(by: str, one: Candidate, other: Candidate, scale: Scale) -> bool:
    """Whether more than noise makes one worse than the other; what was not measured is worse than what was."""
    a, b = sure(one, by, scale), sure(other, by, scale)
    if 2 in (a.kind, b.kind):
        return a.kind > b.kind
    if by == "speed" and one.decode and other.decode:
        most = one.decode.interval[1] if one.decode.interval else one.decode.median
        return most < -b.value
    if by == "quality" and one.line.row.base == other.line.row.base:
        return quality.worse(one.line.row, other.line.row, scale.noise_of(one.line.row))
    return a.value > b.value + b.slack


class Settled(NamedTuple):
    """A choice, and where each other candidate was left behind."""

    choice: Candidate
    left_by: dict[str, str]
    """By name of a candidate, which of `ORDERS` told it from the choice; empty for one that differs in nothing."""
    tied: tuple[Candidate, ...]
    """Those that are alike with the choice in what was asked for first."""


def settled(pool: Sequence[Candidate], sort: str, scale: Scale) -> Settled:
    """The choice of one candidate or more."""
    order, left_by, tied = ORDERS[sort], dict.fromkeys((one.name for one in pool), ""), tuple[Candidate, ...]()
    for by in order:
        ranks = {one.name: sure(one, by, scale) for one in pool}
        best = min(ranks.values())
        near = [one for one in pool if _alike(ranks[one.name], best)]
        kept = [one for one in near if not any(worse(by, one, other, scale) for other in pool)] or near
        left_by.update((one.name, by) for one in pool if one not in kept)
        pool = kept
        tied = tied or tuple(pool)
    choice = min(pool, key=lambda one: [sure(one, by, scale) for by in order])
    return Settled(choice, left_by, tuple(one for one in tied if one is not choice))


def front(pool: Sequence[Candidate], sort: str, scale: Scale) -> list[Candidate]:
    """Those that no other is better than in one of the four and as good as in all, by what is sure; best first.

    Each is compared with those that rank before it until one dominates it: about as many comparisons as candidates
    times what the front holds.
    """
    order = ORDERS[sort]
    ranks = sorted(([sure(one, by, scale) for by in order], place) for place, one in enumerate(pool))

    def dominates(other: Sequence[Sure], one: Sequence[Sure]) -> bool:
        return not any(_behind(a, b) for a, b in zip(other, one, strict=True)) and any(
            _behind(b, a) for a, b in zip(other, one, strict=True)
        )

    return [pool[place] for one, place in ranks if not any(dominates(other, one) for other, _ in ranks)]


def _behind(one: Sure, other: Sure) -> bool:
    return one.kind > other.kind or (one.kind == other.kind and one.value > other.value + other.slack)


def _alike(one: Sure, best: Sure) -> bool:
    return not _behind(one, best)


def by_rank(pool: Sequence[Candidate], sort: str, scale: Scale) -> list[Candidate]:
    """The candidates in the order of what is sure of them."""
    return sorted(pool, key=lambda one: sure(one, ORDERS[sort][0], scale))
