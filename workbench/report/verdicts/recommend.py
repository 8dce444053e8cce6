"""Which variant on which engine, under constraints in words people use.

Everything is decided on one table, so on one machine, one evaluation and one way of measuring. A difference that
noise alone could make decides nothing:

    perplexity   two variants differ if the 95 % interval of their paired difference excludes zero and the difference
                 is larger than what engines alone make of the base; against the base, `table.py` says it
    speed        if their 95 % intervals do not overlap
    memory, size if they differ by more than 1 %

A limit rejects what misses it by more than engines alone make of the base (a speed: with its whole interval); what
misses it by less is kept, with a note, and so is what too few windows leave open. One candidate dominates another if it
is decisively better somewhere and decisively worse nowhere; the front is what nothing dominates. The choice is the best
by what was asked for; among those not decisively worse, the best by the next criterion, and so on.

A variant of a type that the base itself was stored in before has no quality here: what it loses of the base, whose
weights lie on its grid, says nothing of what it loses of the model. Rejected: a single score from weights, which hides
the trade it makes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from workbench.errors import UserError, unknown
from workbench.records import Row
from workbench.report import estimates
from workbench.report.quality import perplexity_delta
from workbench.report.selection import BASE
from workbench.report.table import Line, Table
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
"""Relative difference below which two memories or sizes are alike."""


@dataclass(frozen=True)
class Constraints:
    """Limits and an order that somebody set; None: no limit."""

    memory_bytes: float | None = None
    size_bytes: float | None = None
    max_perplexity: float | None = None
    """Perplexity relative to the base's on the same engine: 0.01 is 1 % worse."""
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

    constraints: Constraints
    choice: Candidate | None
    command: str | None
    front: tuple[Candidate, ...]
    """What nothing dominates of all that was measured, limits or not, by `sort`."""
    fitting: tuple[Candidate, ...]
    rejected: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Every limit that a candidate fails, by its name."""
    tied: tuple[str, ...] = ()
    """Names of candidates from which the choice differs by noise alone in what was asked for."""

    def __str__(self) -> str:
        return text(self)


def recommend(
    table: Table, constraints: Constraints, command: Callable[[Row], str | None] = lambda row: None
) -> Recommendation:
    """The choice among a table's lines; `command` says how to serve what a row is of.

    Raises `UserError` for a backend that no line is of.
    """
    if constraints.sort not in ORDERS:
        raise unknown("order", constraints.sort, ORDERS, "--sort")
    known = {line.row.backend for line in table.lines}
    if constraints.backend is not None and constraints.backend not in known:
        raise unknown("backend", constraints.backend, known, "results")
    floors = {floor.base: floor.spread for floor in table.first.noise_floors}
    fitting: list[Candidate] = []
    measured: list[Candidate] = []
    rejected: dict[str, tuple[str, ...]] = {}
    for line in table.lines:
        if constraints.backend not in (None, line.row.backend):
            continue
        reasons, doubts = _limits(line, constraints, floors.get(line.row.base, 0.0))
        candidate = Candidate(line, _name(table, line), tuple(doubts))
        if reasons:
            rejected[candidate.name] = tuple(reasons)
        else:
            fitting.append(candidate)
        if line.row.measurement and line.values["decode_tok_s"] is not None and line.delta is not None:
            measured.append(candidate)

    def worse(by: str, one: Candidate, other: Candidate) -> bool:
        return _decisively_worse(by, one.line, other.line, floors)

    order = ORDERS[constraints.sort]
    front = [
        one
        for one in measured
        if not any(
            any(worse(by, one, other) for by in order) and not any(worse(by, other, one) for by in order)
            for other in measured
        )
    ]
    pool, tied = list(fitting), []
    for place, by in enumerate(order):
        best = min(pool, key=lambda one: _rank(one.line, by), default=None)
        if best is None:
            break
        pool = [one for one in pool if not worse(by, one, best)]
        if place == 0:
            tied = [one.name for one in pool]
    choice = min(pool, key=lambda one: [_rank(one.line, by) for by in order], default=None)
    return Recommendation(
        constraints=constraints,
        choice=choice,
        command=command(choice.line.row) if choice else None,
        front=tuple(sorted(front, key=lambda one: _rank(one.line, order[0]))),
        fitting=tuple(sorted(fitting, key=lambda one: _rank(one.line, order[0]))),
        rejected=rejected,
        tied=tuple(name for name in tied if choice and name != choice.name),
    )


def on_the_bases_grid(row: Row) -> str | None:
    """Why the quality of a variant decides nothing: the base was stored in one of its types before."""
    shared = [kind for kind in row.base_types if kind in row.artifact.tensor_types.values()]
    if not shared:
        return None
    return f"its quality decides nothing: the base was de-quantized from {', '.join(shared)}, whose grid it shares"


def memory_bytes(line: Line) -> float | None:
    """What must be there to run it: device memory where it ran on one, else the processes' peak."""
    vram = line.values["peak_vram_bytes"]
    return vram if vram and line.row.device != "cpu" else line.values["peak_rss_bytes"]


VALUES: dict[str, Callable[[Line], float | None]] = {
    "speed": lambda line: line.values["decode_tok_s"],
    "quality": lambda line: None if on_the_bases_grid(line.row) else line.values["perplexity"],
    "memory": memory_bytes,
    "size": lambda line: line.values["disk_bytes"],
}
"""What each of `ORDERS` goes by."""


def parse_share(text: str, option: str) -> tuple[float | None, float | None]:
    """`1%` as (0.01, None): more than the base's; `12.5` as (None, 12.5): the value itself."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise UserError(f"{option} {text}: write 1% (more than the base's) or the value itself, such as 12.5")
    return (float(match[1]) / 100, None) if match[2] else (None, float(match[1]))


def objects(found: Recommendation) -> dict[str, object]:
    """A recommendation as JSON types, SI units."""
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
    lines = [f"Pareto front (quality, speed, memory, size), by {found.constraints.sort}:"]
    lines += [f"  {printable(one.name):40} {_numbers(one.line)}" for one in found.front] or ["  nothing was measured"]
    if found.rejected:
        lines += ["", "Rejected:"]
        lines += [f"  {printable(name):40} {printable('; '.join(why))[:300]}" for name, why in found.rejected.items()]
    if found.choice is None:
        lines += ["", "Nothing fits. The limits above say by how much."]
        return "\n".join(lines) + "\n"
    lines += ["", f"Choice: {printable(found.choice.name)}", f"  {_numbers(found.choice.line)}"]
    if found.tied:
        lines.append(f"  by {found.constraints.sort} alone not to be told from: {printable(', '.join(found.tied))}")
    lines += [f"  note: {doubt}" for doubt in found.choice.doubts]
    others = [(one, why) for one in found.fitting if one != found.choice and (why := on_the_bases_grid(one.line.row))]
    lines += [f"  note: {printable(one.name)}: {why}" for one, why in others]
    if found.command:
        lines += ["", "Serve it with:", f"  {found.command}"]
    return "\n".join(lines) + "\n"


def _name(table: Table, line: Line) -> str:
    row = line.row
    details = [f"{column.name} {text}" for column in table.varying if (text := column.text(row))]
    more = f" ({', '.join(details)})" if details else ""
    return f"{row.artifact.variant} on {row.backend}{more}"


def _limits(line: Line, constraints: Constraints, spread: float) -> tuple[list[str], list[str]]:
    """(Limits that a line fails, limits that it misses by no more than noise.)"""
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

    at_most(memory_bytes(line), constraints.memory_bytes, "memory", size_text, 0.0)
    at_most(line.values["disk_bytes"], constraints.size_bytes, "size", size_text, 0.0)
    perplexity = line.values["perplexity"]
    untold = on_the_bases_grid(row)
    if untold:
        limits = (constraints.max_perplexity, constraints.max_perplexity_value, constraints.max_kld)
        (doubts if limits == (None,) * 3 else reasons).append(untold)
    elif constraints.max_perplexity is not None:
        relative, noise = None, 0.0
        if line.delta is not None and perplexity is not None and perplexity > line.delta.value:
            base = perplexity - line.delta.value
            noise = spread / base
            relative = line.delta.value / base
            interval = estimates.interval(line.delta)
            if interval and interval[0] / base < constraints.max_perplexity < interval[1] / base:
                doubts.append(
                    f"too few windows to be sure of {constraints.max_perplexity:.2%}: perplexity "
                    f"{interval[0] / base:+.2%} to {interval[1] / base:+.2%} of the base's (95 %)"
                )
        at_most(relative, constraints.max_perplexity, "perplexity", lambda share: f"{share:+.2%}", noise)
    at_most(perplexity, constraints.max_perplexity_value, "perplexity", lambda value: f"{value:.4g}", spread)
    kld_se = line.errors.get("kld_mean") or 0.0
    at_most(line.values["kld_mean"], constraints.max_kld, "divergence", lambda value: f"{value:.4f} nat", 1.96 * kld_se)
    for what, limit in (("decode", constraints.min_decode_tok_s), ("prefill", constraints.min_prefill_tok_s)):
        value, interval = line.values[f"{what}_tok_s"], line.intervals[f"{what}_tok_s"]
        if limit is None:
            continue
        if value is None:
            reasons.append(f"{what} was not measured")
        elif value < limit and (interval is None or interval[1] < limit):
            reasons.append(f"{what} {value:.1f} tok/s, at least {limit:g}")
        elif value < limit:
            doubts.append(f"{what} {value:.1f} tok/s is under {limit:g}, but by no more than noise")
    return reasons, doubts


def _decisively_worse(by: str, one: Line, other: Line, floors: dict[str, float]) -> bool:
    """Whether more than noise makes one line worse than another; what was not measured is worse than what was."""
    a, b = VALUES[by](one), VALUES[by](other)
    if a is None or b is None:
        return a is None and b is not None
    if by == "speed":
        intervals = [line.intervals["decode_tok_s"] for line in (one, other)]
        return (intervals[0] or (a, a))[1] < (intervals[1] or (b, b))[0]
    if by != "quality":
        return a > b * (1 + TOLERANCE)
    if one.row.base != other.row.base:
        return a > b
    difference = perplexity_delta(one.row, other.row)
    if difference is None or difference.value <= floors.get(one.row.base, 0.0):
        return False
    interval = estimates.interval(difference)
    return interval is None or interval[0] > 0


def _rank(line: Line, by: str) -> float:
    """Smaller is better; what was not measured comes last."""
    value = VALUES[by](line)
    return math.inf if value is None else -value if by == "speed" else value


def _object(one: Candidate) -> dict[str, object]:
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
    decode, perplexity = line.values["decode_tok_s"], line.values["perplexity"]
    memory, size = memory_bytes(line), line.values["disk_bytes"]
    change = ""
    if perplexity is not None and line.delta is not None and line.row.artifact.method != BASE:
        relative = line.delta.value / (perplexity - line.delta.value)
        change = f" ({'~' if line.below_noise_floor else ''}{relative:+.2%})"
    parts = (
        "" if decode is None else f"{decode:.1f} tok/s",
        "" if perplexity is None else f"perplexity {perplexity:.3f}{change}",
        "" if memory is None else f"{size_text(memory)} memory",
        f"{size_text(size)} on disk" if size else "",
    )
    return ", ".join(filter(None, parts))
