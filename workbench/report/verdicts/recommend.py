"""Which variant on which engine, under constraints in words people use.

Everything is decided on one table, so on one machine, one evaluation and one way of measuring. A difference that
noise alone could make decides nothing:

    perplexity   two variants differ if the 95 % interval of their paired difference excludes zero and the difference
                 is larger than what engines alone make of the base; against the base, `table.py` says it
    speed        if their 95 % intervals do not overlap
    memory, size if they differ by more than 1 %

A limit rejects what misses it by more than engines alone make of the base (a speed: with its whole interval); what
misses it by less is kept, with a note, and so is what too few windows leave open. One candidate
dominates another if it is decisively better somewhere and decisively worse nowhere; the front is what nothing
dominates. The choice is the best by what was asked for; among those not decisively worse, the best by the next
criterion, and so on. Rejected: a single score from weights, which hides the trade it makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import UserError, unknown
from workbench.records import Row
from workbench.report import estimates
from workbench.report.quality import perplexity_delta
from workbench.report.selection import BASE
from workbench.report.table import Line, Table, device
from workbench.report.units import printable
from workbench.sizes import size_text

ORDERS = {
    "speed": ("speed", "quality", "memory", "size"),
    "quality": ("quality", "speed", "memory", "size"),
    "memory": ("memory", "quality", "speed", "size"),
    "size": ("size", "quality", "speed", "memory"),
}
"""What `--sort` may be, and what decides where it does not."""

TOLERANCE = 0.01
"""Relative: memory and size nearer than this are alike."""


@dataclass(frozen=True)
class Wishes:
    """What the person asked for; None: no limit."""

    memory_bytes: float | None = None
    size_bytes: float | None = None
    max_perplexity: float | None = None
    """Relative to the base's on the same engine: 0.01 is 1 % worse."""
    max_perplexity_value: float | None = None
    """The perplexity itself."""
    max_kld: float | None = None
    min_decode_tok_s: float | None = None
    min_prefill_tok_s: float | None = None
    backend: str | None = None
    sort: str = "speed"


@dataclass(frozen=True)
class Candidate:
    """A line of the table that was measured."""

    line: Line
    name: str
    """Variant and engine, and what else tells it from another line."""
    doubts: tuple[str, ...] = ()
    """Limits that it misses by no more than noise."""


@dataclass(frozen=True)
class Recommendation:
    """What fits, what is chosen, and why the others are not."""

    wishes: Wishes
    choice: Candidate | None
    command: str | None
    front: tuple[Candidate, ...]
    """Of all that was measured, limits or not, by `sort`."""
    fitting: tuple[Candidate, ...]
    rejected: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By name: every limit that it fails."""
    tied: tuple[str, ...] = ()
    """Those from which the choice differs by noise alone in what was asked for."""


def recommend(table: Table, wishes: Wishes, command: Callable[[Row], str | None] = lambda row: None) -> Recommendation:
    """The choice among a table's lines; `command` says how to serve what a row is of.

    Raises `UserError` for a backend that no line is of.
    """
    if wishes.sort not in ORDERS:
        raise unknown("order", wishes.sort, ORDERS, "--sort")
    known = {line.row.backend for line in table.lines}
    if wishes.backend is not None and wishes.backend not in known:
        raise unknown("backend", wishes.backend, known, "results")
    floors = {floor.base: floor.spread for floor in table.first.noise_floors}
    fitting: list[Candidate] = []
    measured: list[Candidate] = []
    rejected: dict[str, tuple[str, ...]] = {}
    for line in table.lines:
        if wishes.backend not in (None, line.row.backend):
            continue
        reasons, doubts = _limits(line, wishes, floors.get(line.row.base, 0.0))
        candidate = Candidate(line, _name(table, line), tuple(doubts))
        if reasons:
            rejected[candidate.name] = tuple(reasons)
        else:
            fitting.append(candidate)
        if line.row.measurement and line.values["decode_tok_s"] is not None and line.delta is not None:
            measured.append(candidate)
    worse = {
        "speed": _slower,
        "quality": _less_alike(floors),
        "memory": _larger(memory_bytes),
        "size": _larger(lambda line: line.values["disk_bytes"]),
    }
    order = ORDERS[wishes.sort]
    front = [
        one
        for one in measured
        if not any(
            any(worse[by](one.line, other.line) for by in worse)
            and not any(worse[by](other.line, one.line) for by in worse)
            for other in measured
        )
    ]
    pool, tied = list(fitting), []
    for place, by in enumerate(order):
        best = min(pool, key=lambda one: _rank(one.line, by), default=None)
        if best is None:
            break
        pool = [one for one in pool if not worse[by](one.line, best.line)]
        if place == 0:
            tied = [one.name for one in pool]
    choice = min(pool, key=lambda one: [_rank(one.line, by) for by in order], default=None)
    return Recommendation(
        wishes=wishes,
        choice=choice,
        command=command(choice.line.row) if choice else None,
        front=tuple(sorted(front, key=lambda one: _rank(one.line, order[0]))),
        fitting=tuple(sorted(fitting, key=lambda one: _rank(one.line, order[0]))),
        rejected=rejected,
        tied=tuple(name for name in tied if choice and name != choice.name),
    )


def memory_bytes(line: Line) -> float | None:
    """What must be there to run it: device memory where it ran on one, else the processes' peak."""
    vram = line.values["peak_vram_bytes"]
    return vram if vram and device(line.row) != "cpu" else line.values["peak_rss_bytes"]


def parse_share(text: str, option: str) -> tuple[float | None, float | None]:
    """`1%` as (0.01, None): more than the base's; `12.5` as (None, 12.5): the value itself."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise UserError(f"{option} {text}: write 1% (more than the base's) or the value itself, such as 12.5")
    return (float(match[1]) / 100, None) if match[2] else (None, float(match[1]))


def objects(found: Recommendation) -> dict[str, Any]:
    """All of it as JSON types, SI units."""
    return {
        "choice": _object(found.choice) if found.choice else None,
        "command": found.command,
        "tied": list(found.tied),
        "front": [_object(one) for one in found.front],
        "fitting": [_object(one) for one in found.fitting],
        "rejected": {name: list(reasons) for name, reasons in found.rejected.items()},
    }


def json_text(found: Recommendation) -> str:
    """`objects` as JSON."""
    return json.dumps(objects(found), indent=2, allow_nan=False) + "\n"


def text(found: Recommendation) -> str:
    """The front, the choice, the command, and what each of the others failed on."""
    lines = [f"Pareto front (quality, speed, memory, size), by {found.wishes.sort}:"]
    lines += [f"  {printable(one.name):40} {_numbers(one.line)}" for one in found.front] or ["  nothing was measured"]
    if found.rejected:
        lines += ["", "Rejected:"]
        lines += [f"  {printable(name):40} {printable('; '.join(why))[:300]}" for name, why in found.rejected.items()]
    if found.choice is None:
        lines += ["", "Nothing fits. The limits above say by how much."]
        return "\n".join(lines) + "\n"
    lines += ["", f"Choice: {printable(found.choice.name)}", f"  {_numbers(found.choice.line)}"]
    if found.tied:
        lines.append(f"  by {found.wishes.sort} alone not to be told from: {printable(', '.join(found.tied))}")
    lines += [f"  note: {doubt}" for doubt in found.choice.doubts]
    if found.command:
        lines += ["", "Serve it with:", f"  {found.command}"]
    return "\n".join(lines) + "\n"


def _name(table: Table, line: Line) -> str:
    row = line.row
    details = [f"{column.name} {text}" for column in table.varying if (text := column.text(row))]
    more = f" ({', '.join(details)})" if details else ""
    return f"{row.artifact.variant} on {row.backend}{more}"


def _limits(line: Line, wishes: Wishes, spread: float) -> tuple[list[str], list[str]]:
    """(what it fails, what it misses by no more than noise)."""
    row = line.row
    if row.unsupported:
        return [f"cannot run: {row.unsupported}"], []
    if row.error:
        return [f"failed: {row.error}"], []
    reasons: list[str] = []
    doubts: list[str] = []

    def at_most(
        value: float | None, limit: float | None, what: str, show: Callable[[float], str], noise: float
    ) -> None:
        if limit is None:
            return
        if value is None:
            reasons.append(f"{what} was not measured")
        elif value > limit + noise:
            reasons.append(f"{what} {show(value)}, at most {show(limit)}")
        elif value > limit:
            doubts.append(f"{what} {show(value)} is over {show(limit)}, but by no more than noise")

    at_most(memory_bytes(line), wishes.memory_bytes, "memory", size_text, 0.0)
    at_most(line.values["disk_bytes"], wishes.size_bytes, "size", size_text, 0.0)
    perplexity = line.values["perplexity"]
    if wishes.max_perplexity is not None:
        relative, noise = None, 0.0
        if line.delta is not None and perplexity is not None and perplexity > line.delta.value:
            base = perplexity - line.delta.value
            noise = spread / base
            relative = line.delta.value / base
            interval = estimates.interval(line.delta)
            if interval and interval[0] / base < wishes.max_perplexity < interval[1] / base:
                doubts.append(
                    f"too few windows to be sure of {wishes.max_perplexity:.2%}: perplexity "
                    f"{interval[0] / base:+.2%} to {interval[1] / base:+.2%} of the base's (95 %)"
                )
        at_most(relative, wishes.max_perplexity, "perplexity", lambda share: f"{share:+.2%}", noise)
    at_most(perplexity, wishes.max_perplexity_value, "perplexity", lambda value: f"{value:.4g}", spread)
    kld_se = line.errors.get("kld_mean") or 0.0
    at_most(line.values["kld_mean"], wishes.max_kld, "divergence", lambda value: f"{value:.4f} nat", 1.96 * kld_se)
    for name, what, limit, interval in (
        ("decode_tok_s", "decode", wishes.min_decode_tok_s, line.intervals["decode_tok_s"]),
        ("prefill_tok_s", "prefill", wishes.min_prefill_tok_s, line.intervals["prefill_tok_s"]),
    ):
        value = line.values[name]
        if limit is None:
            continue
        if value is None:
            reasons.append(f"{what} was not measured")
        elif value < limit and (interval is None or interval[1] < limit):
            reasons.append(f"{what} {value:.1f} tok/s, at least {limit:g}")
        elif value < limit:
            doubts.append(f"{what} {value:.1f} tok/s is under {limit:g}, but by no more than noise")
    return reasons, doubts


def _slower(one: Line, other: Line) -> bool:
    """Decisively: the intervals of the medians do not meet."""
    a, b = one.values["decode_tok_s"], other.values["decode_tok_s"]
    if a is None or b is None:
        return a is None and b is not None
    high = one.intervals["decode_tok_s"][1] if one.intervals["decode_tok_s"] else a
    low = other.intervals["decode_tok_s"][0] if other.intervals["decode_tok_s"] else b
    return high < low


def _less_alike(floors: dict[str, float]) -> Callable[[Line, Line], bool]:
    def worse(one: Line, other: Line) -> bool:
        if one.values["perplexity"] is None or other.values["perplexity"] is None:
            return one.values["perplexity"] is None and other.values["perplexity"] is not None
        if one.row.base != other.row.base:
            return one.values["perplexity"] > other.values["perplexity"]
        difference = perplexity_delta(one.row, other.row)
        if difference is None or difference.value <= floors.get(one.row.base, 0.0):
            return False
        interval = estimates.interval(difference)
        return interval is None or interval[0] > 0

    return worse


def _larger(value: Callable[[Line], float | None]) -> Callable[[Line, Line], bool]:
    def worse(one: Line, other: Line) -> bool:
        a, b = value(one), value(other)
        if a is None or b is None:
            return a is None and b is not None
        return a > b * (1 + TOLERANCE)

    return worse


def _rank(line: Line, by: str) -> float:
    """Smaller is better; what was not measured comes last."""
    value = {
        "speed": line.values["decode_tok_s"],
        "quality": line.values["perplexity"],
        "memory": memory_bytes(line),
        "size": line.values["disk_bytes"],
    }[by]
    if value is None:
        return float("inf")
    return -value if by == "speed" else value


def _object(one: Candidate) -> dict[str, Any]:
    line = one.line
    return {
        "variant": line.row.artifact.variant,
        "backend": line.row.backend,
        "base": line.row.base,
        "path": line.row.artifact.path,
        "decode_tok_s": line.values["decode_tok_s"],
        "prefill_tok_s": line.values["prefill_tok_s"],
        "perplexity": line.values["perplexity"],
        "perplexity_delta": line.delta.value if line.delta else None,
        "memory_bytes": memory_bytes(line),
        "disk_bytes": line.values["disk_bytes"],
        "doubts": list(one.doubts),
    }


def _numbers(line: Line) -> str:
    parts = []
    decode, perplexity, memory = line.values["decode_tok_s"], line.values["perplexity"], memory_bytes(line)
    if decode is not None:
        parts.append(f"{decode:.1f} tok/s")
    if perplexity is not None:
        if line.delta is not None and line.row.artifact.method != BASE:
            mark = "~" if line.below_noise_floor else ""
            relative = line.delta.value / (perplexity - line.delta.value)
            parts.append(f"perplexity {perplexity:.3f} ({mark}{relative:+.2%})")
        else:
            parts.append(f"perplexity {perplexity:.3f}")
    if memory is not None:
        parts.append(f"{size_text(memory)} memory")
    if line.values["disk_bytes"]:
        parts.append(f"{size_text(line.values['disk_bytes'])} on disk")
    return ", ".join(parts)
