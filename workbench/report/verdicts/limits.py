"""Whether what was measured keeps the limits of a wish: surely, surely not, or undecided.

A limit is kept where the whole 95 % interval keeps it and failed where none of it does. Between them it is undecided:
what is known not to fail is not known to hold. Whoever chooses puts what holds first (`recommend.py`), or the worst
measurement would win: an interval from 0.2 to 929.6 overlaps everything. Perplexities over their limit fail however few
the windows, but for what engines alone make of the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from workbench.records import Row
from workbench.report import estimates, quality, speeds
from workbench.report.estimates import Estimate
from workbench.report.quality import Noise
from workbench.report.selection import BASE
from workbench.report.speeds import Rate
from workbench.report.table import Line, Table
from workbench.report.verdicts.wish import Constraints, named
from workbench.sizes import size_text

Interval = tuple[float, float]
Cure = Literal["again", "windows", "items"]
"""What would decide a limit: measuring again, more windows of text, more items of a task."""


@dataclass(frozen=True)
class Doubt:
    """A limit that is undecided."""

    words: str
    likely: bool
    """Whether the value itself keeps the limit, though not its whole interval."""
    cure: Cure


@dataclass(frozen=True)
class Candidate:
    """A line of the table that was measured, as a wish sees it."""

    line: Line
    name: str
    """Variant and engine, and what else tells it from another line."""
    decode: Rate | None = None
    """At the workload point that the wish is about."""
    prefill: Rate | None = None
    served: Rate | None = None
    doubts: tuple[Doubt, ...] = ()
    """Limits that are undecided."""

    @property
    def standing(self) -> int:
        """0: it keeps all limits; 1: it is likely to; 2: it may."""
        return 0 if not self.doubts else 1 if all(doubt.likely for doubt in self.doubts) else 2

    @property
    def notes(self) -> tuple[str, ...]:
        """What its row warns of."""
        return tuple(filter(None, (untold(self.line), *self.line.warnings)))


def on_the_bases_grid(row: Row) -> str | None:
    """Why the quality of a variant decides nothing: the base was stored in one of its types before."""
    shared = [kind for kind in row.base_types if kind in row.artifact.tensor_types.values()]
    if not shared:
        return None
    return f"its quality decides nothing: the base was de-quantized from {', '.join(shared)}, whose grid it shares"


def untold(line: Line) -> str | None:
    """Why a line's quality decides nothing, in words; None where it does."""
    return on_the_bases_grid(line.row) or (
        f"its quality decides nothing: {line.lost_tokens}" if line.lost_tokens else None
    )


def memory_bytes(line: Line) -> float | None:
    """What must be there to run it: device memory where it ran on one, else the processes' peak. None where it is not
    known: what a process takes on the host says nothing of its GPU."""
    on_host = line.row.device in ("cpu", "metal")  # Apple's GPUs take theirs of the host.
    return line.values["peak_rss_bytes"] if on_host else line.values["peak_vram_bytes"] or None


def judged(table: Table, place: int, name: str, wish: Constraints, noise: Noise) -> tuple[Candidate, tuple[str, ...]]:
    """The table's line at `place` as a candidate, and every limit that it fails."""
    line = table.lines[place]
    if line.row.unsupported:
        return Candidate(line, name), (f"cannot run: {line.row.unsupported}",)
    if line.row.error:
        return Candidate(line, name), (f"failed: {line.row.error}",)
    point = speeds.at(line.row, wish.batch, wish.context)
    slots = wish.batch or max(line.row.workload.batches)
    candidate = Candidate(
        line,
        name,
        decode=speeds.decode_rate(point) if point else None,
        prefill=speeds.prefill_rate(point) if point else None,
        served=next((rate for many, rate in speeds.served_rates(line.row) if many == slots), None),
    )
    verdicts = [*_verdicts(table, place, candidate, wish, noise)]
    doubts = tuple(each for each in verdicts if isinstance(each, Doubt))
    return replace(candidate, doubts=doubts), tuple(each for each in verdicts if isinstance(each, str))


def _verdicts(
    table: Table, place: int, candidate: Candidate, wish: Constraints, noise: Noise
) -> Iterator[str | Doubt | None]:
    """A reason for each limit that fails, a doubt for each that is undecided, None for each that is kept."""
    line = candidate.line
    memory = memory_bytes(line)
    of_the_host_alone = memory is None and line.values["peak_rss_bytes"] is not None
    for what, bytes_, most in (
        ("memory on the GPU" if of_the_host_alone else "memory", memory, wish.memory_bytes),
        ("size", line.values["disk_bytes"], wish.size_bytes),
    ):
        yield _verdict(what, bytes_, None if bytes_ is None else (bytes_, bytes_), most, size_text)
    yield from _quality(table, place, wish, noise)
    for name, score_limit in named(wish.min_accuracy):
        for task in [name] if name else [*table.tasks] or ["tasks"]:
            score = line.tasks.get(task)
            value, interval = (score.accuracy.value, score.interval) if score else (None, None)
            yield _verdict(f"accuracy on {task}", value, interval, score_limit, "{:.1%}".format, "items", least=True)
    if (wish.batch or wish.context) and candidate.decode is None:
        measured = ", ".join(f"{length} tokens x {many}" for length, many in line.row.workload.points)
        asked = f"{wish.context or 'any'} tokens x {wish.batch or line.row.workload.points[0][1]}"
        yield f"speed was not measured at {asked}, only with prompts of {measured}: see the recipe's `workload:`"
        return
    for what, rate, fewest in (
        ("decode", candidate.decode, wish.min_decode_tok_s),
        ("prefill", candidate.prefill, wish.min_prefill_tok_s),
        ("served", candidate.served, wish.min_served_tok_s),
    ):
        value, interval = (rate.median, rate.interval) if rate else (None, None)
        yield _verdict(what, value, interval, fewest, "{:.1f} tok/s".format, least=True)


def _quality(table: Table, place: int, wish: Constraints, noise: Noise) -> Iterator[str | Doubt | None]:
    line = table.lines[place]
    if why := untold(line):
        asked = named(wish.max_kld) or (wish.max_perplexity, wish.max_perplexity_value) != (None, None)
        yield why if asked else None
        return
    perplexity, delta, engines = line.values["perplexity"], line.delta, noise.perplexity or 0.0
    relative, interval, slack = None, None, 0.0
    if delta is not None and perplexity is not None and perplexity > delta.value:
        base = perplexity - delta.value
        ends = (0.0, 0.0) if line.row.artifact.method == BASE else estimates.interval(delta)
        relative, slack = delta.value / base, engines / base
        interval = ends and (ends[0] / base, ends[1] / base)
    compared = "perplexity" if relative is not None or perplexity is None else "perplexity beside the base's"
    yield _verdict(compared, relative, interval, wish.max_perplexity, "{:+.2%}".format, "windows", slack=slack)
    exact = None if perplexity is None else (perplexity, perplexity)
    limit = wish.max_perplexity_value
    yield _verdict("perplexity", perplexity, exact, limit, "{:.4g}".format, "windows", slack=engines)
    for name, most in named(wish.max_kld):
        own = table.sets[name].lines[place] if name else line
        if why := untold(own):
            yield why
            continue
        found = divergence(own)
        value, interval = (found.value, estimates.interval(found)) if found else (None, None)
        what = f"divergence on {name}" if name else "divergence"
        yield _verdict(what, value, interval, most, "{:.4f} nat".format, "windows")


def divergence(line: Line) -> Estimate | None:
    """Mean divergence from the base, nats a token; None unless it is from the table's reference."""
    return _divergence(line.row) if line.values["kld_mean"] is not None else None


_divergence = quality.compared(estimates.divergence)


def _verdict(
    what: str,
    value: float | None,
    interval: Interval | None,
    limit: float | None,
    show: Callable[[float], str],
    cure: Cure = "again",
    least: bool = False,
    slack: float | None = None,
) -> str | Doubt | None:
    """Why a limit fails, why it is undecided, or None. `slack`: by how much a value may be over its limit and still be
    undecided; without one the interval says."""
    if limit is None:
        return None
    if value is None:
        return f"{what} was not measured"
    sign = -1 if least else 1
    ends = sorted(sign * end for end in interval) if interval else [sign * value, math.inf]
    nearest = sign * value - slack if slack is not None else ends[0]
    wanted = f"at {'least' if least else 'most'} {show(limit)}"
    told = " to ".join(show(end).partition(" ")[0] for end in interval) if interval else "no interval"
    known = "" if interval and interval[0] == interval[1] else f" ({told})"
    if nearest > sign * limit:
        # Shown where it decides: what a slack is allowed for fails by the value, whatever its interval.
        return f"{what} {show(value)}{known if interval and slack is None else ''}, {wanted}"
    if ends[1] <= sign * limit:
        return None
    return Doubt(f"{what} {show(value)}{known}, {wanted}", sign * value <= sign * limit, cure)
