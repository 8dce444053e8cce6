"""What a browser needs to choose a row under limits as `workbench recommend` does: figures, and what is sure of them.

The browser compares and sorts (`choice.js`); whatever is statistics is done here, by the same functions: intervals, and
which variant is worse than which in quality, paired on the same tokens. Before anything is asked for, and without
JavaScript, the page shows `recommend`'s own answer without limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.records import Row
from workbench.report import estimates
from workbench.report.metrics import JUDGED
from workbench.report.site.plots import row_ids
from workbench.report.site.words import full_name
from workbench.report.speeds import decode_rate
from workbench.report.table import Table
from workbench.report.verdicts.limits import Candidate, divergence, judged, memory_bytes, on_the_bases_grid
from workbench.report.verdicts.order import Scale, scale_of, settled, sure, worse
from workbench.report.verdicts.wish import ORDERS, Constraints
from workbench.sizes import mib_text, size_text

MOST = 300
"""Candidates that a page lets one choose from: each is compared with each. `workbench recommend` takes any number."""
Figure = tuple[float, float | None, float | None]
"""A value and its 95 % interval, as far as it has one."""


@dataclass(frozen=True)
class Choices:
    """All that can be chosen from, as JSON types, and what is chosen without limits."""

    data: dict[str, object]
    first: dict[str, object] | None
    contexts: list[int]
    """Tokens of a sequence at which speeds were measured."""


def choices(table: Table, command: Callable[[Row], str | None]) -> Choices:
    """The table's rows that ran, as candidates; `command` says how to serve what a row is of."""
    scale, ids, all_limits_off = scale_of(table), row_ids(table), Constraints()
    found: list[Candidate] = []
    for place, line in enumerate(table.lines):
        name = full_name(table, line)
        candidate, failed = judged(table, place, name, all_limits_off, scale.noise_of(line.row))
        if not failed:
            found.append(candidate)
    if len(found) > MOST:
        return Choices({}, None, [])
    rows = [_object(one, found, scale, ids[one.line.row.key], command) for one in found]
    # Without limits nothing is open, and this is all that `recommend` does.
    chosen = settled(found, all_limits_off.sort, scale).choice if found else None
    first = next((row for one, row in zip(found, rows, strict=True) if one is chosen), None)
    contexts = sorted({point[0] for one in found for point in _points(one)})
    data: dict[str, object] = {"rows": rows, "orders": ORDERS, "alike": JUDGED["decode_tok_s"].threshold}
    return Choices(data, first, contexts)


def _object(
    one: Candidate, others: list[Candidate], scale: Scale, id: str, command: Callable[[Row], str | None]
) -> dict[str, object]:
    line = one.line
    memory, size = memory_bytes(line), line.values["disk_bytes"]
    kld = divergence(line)
    ends = estimates.interval(kld) if kld else None
    told = [
        f"divergence {kld.value:.4f} nat" + (f" ({max(0.0, ends[0]):.4f} to {ends[1]:.4f})" if ends else "")
        if kld
        else "",
        f"{size_text(memory)} of memory" if memory else "",
        f"{mib_text(size)} on disk" if size else "",
    ]
    return {
        "id": id,
        "name": one.name,
        "variant": line.row.artifact.variant,
        "engine": line.row.backend,
        "figures": ", ".join(filter(None, told)),
        "command": command(line.row),
        "notes": list(one.notes),
        "memory": _exact(memory),
        "divergence": None if kld is None or on_the_bases_grid(line.row) else [kld.value, *(ends or (None, None))],
        "points": _points(one),
        # (kind, value, slack), as `order.py` has them, and the places of those that this one is worse than.
        "sure": {by: [*sure(one, by, scale)] for by in ("quality", "memory", "size")},
        "worse": [
            place
            for place, other in enumerate(others)
            if not _is_closer(one, other) and worse("quality", one, other, scale)
        ],
    }


def _is_closer(one: Candidate, other: Candidate) -> bool:
    """Whether a look at two divergences from one reference is enough to know that the first is not worse."""
    a, b = one.line.values["kld_mean"], other.line.values["kld_mean"]
    return one.line.row.base == other.line.row.base and a is not None and b is not None and a <= b


def _exact(value: float | None) -> Figure | None:
    return None if value is None else (value, value, value)


def _points(one: Candidate) -> list[tuple[int, float, float | None, float | None]]:
    """(tokens of a sequence, tokens a second, its interval) at each length in the first batch size, the headline first
    and the others from the shortest on."""
    speeds = one.line.row.measurement.speeds if one.line.row.measurement else []
    own = [speed for speed in speeds if speed.batch == one.line.row.workload.points[0][1]]
    rates = [(speed.prompt_tokens + speed.new_tokens, rate) for speed in own if (rate := decode_rate(speed))]
    found = [(tokens, rate.median, *(rate.interval or (None, None))) for tokens, rate in rates]
    return [*found[:1], *sorted(found[1:])]
