"""A choice among the rows of a table: what keeps all limits, and of that the best by what somebody asked for.

What is known to keep every limit goes before what is likely to, and that before what only may (`limits.py`); what was
not measured cannot meet a limit. Within the first of these that is not empty, `order.py` decides. Quality is paired on
the same tokens, and no variant wins by it whose quantized type is one that the base itself was de-quantized from: its
grid is the base's own, so it loses almost nothing of that base, whatever it would lose of the original model.

The Pareto front shows what there is to choose from: everything that nothing else is better than in one of quality,
speed, memory and size and as good as in all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from workbench.errors import unknown
from workbench.records import Row
from workbench.report import forms
from workbench.report.speeds import Rate
from workbench.report.table import Line, Table
from workbench.report.verdicts.advice import Recommendation
from workbench.report.verdicts.limits import Candidate, judged, memory_bytes
from workbench.report.verdicts.order import Scale, Settled, by_rank, front, scale_of, settled
from workbench.report.verdicts.wish import ORDERS, Constraints, named, parse_named, parse_share

__all__ = ["Candidate", "Constraints", "Recommendation", "parse_named", "parse_share", "recommend"]


def recommend(
    table: Table, constraints: Constraints, command: Callable[[Row], str | None] = lambda row: None
) -> Recommendation:
    """The choice among a table's lines; `command` says how to serve what a row is of.

    Raises `UserError` for a backend that no line is of, and for a set or task that the table has not.
    """
    sort = constraints.sort
    _check(table, constraints)
    scale = scale_of(table)
    fitting: list[Candidate] = []
    measured: list[Candidate] = []
    rejected: dict[str, tuple[str, ...]] = {}
    for place, line in enumerate(table.lines):
        if constraints.backend not in (None, line.row.backend):
            continue
        name = _name(table, line)
        candidate, reasons = judged(table, place, name, constraints, scale.noise_of(line.row))
        if reasons:
            rejected[name] = reasons
        else:
            fitting.append(candidate)
        if line.row.measurement and candidate.decode and line.delta is not None:
            measured.append(candidate)
    first = _best(fitting, sort, scale)
    choice = first.choice if first else None
    second = _best([one for one in fitting if one is not choice], sort, scale)
    runner_up = second.choice if second else None
    hope = settled(fitting, sort, scale).choice if fitting else None
    return Recommendation(
        constraints=constraints,
        choice=choice,
        command=command(choice.line.row) if choice else None,
        front=tuple(front(measured, sort, scale)),
        fitting=tuple(by_rank(fitting, sort, scale)),
        rejected=rejected,
        tied=tuple(one.name for one in first.tied) if first else (),
        runner_up=runner_up,
        why=first.left_by.get(runner_up.name, "limits") if first and runner_up else "",
        hope=hope if hope is not choice and hope and hope.doubts else None,
    )


def objects(found: Recommendation) -> dict[str, object]:
    """A recommendation as JSON types, SI units."""
    return {
        "wish": str(found.constraints),
        "choice": _object(found.choice),
        "command": found.command,
        "tied": list(found.tied),
        "runner_up": _object(found.runner_up),
        "why": found.why,
        "hope": _object(found.hope),
        "front": [_object(one) for one in found.front],
        "fitting": [_object(one) for one in found.fitting],
        "rejected": {name: list(reasons) for name, reasons in found.rejected.items()},
    }


def json_text(found: Recommendation) -> str:
    """`objects` as JSON."""
    return json.dumps(objects(found), indent=2, allow_nan=False) + "\n"


def _best(pool: Sequence[Candidate], sort: str, scale: Scale) -> Settled | None:
    """The best of those that stand best towards their limits."""
    standing = min((one.standing for one in pool), default=0)
    likeliest = [one for one in pool if one.standing == standing]
    return settled(likeliest, sort, scale) if likeliest else None


def _check(table: Table, constraints: Constraints) -> None:
    if constraints.sort not in ORDERS:
        raise unknown("order", constraints.sort, ORDERS, "--sort")
    backends = {line.row.backend for line in table.lines}
    names: list[tuple[str, str, Iterable[str]]] = [("backend", constraints.backend or "", backends)]
    names += [("evaluation set", name, table.sets) for name, _ in named(constraints.max_kld)]
    names += [("task", name, table.tasks) for name, _ in named(constraints.min_accuracy)]
    for what, name, known in names:
        if name and name not in known:
            raise unknown(what, name, known, "results")


def _name(table: Table, line: Line) -> str:
    row = line.row
    columns = table.telling[row.artifact.variant, row.backend]
    details = [f"{column.name} {text}" for column in columns if (text := column.text(row))]
    more = f" ({', '.join(details)})" if details else ""
    return f"{row.artifact.variant} on {row.backend}{more}"


def _object(one: Candidate | None) -> dict[str, object] | None:
    if one is None:
        return None
    line = one.line
    return {
        "name": one.name,
        "variant": line.row.artifact.variant,
        "backend": line.row.backend,
        "base": line.row.base,
        "path": line.row.artifact.path,
        "container": forms.container(line.row),
        "weights_held": forms.held(line.row),
        "engine_bits_per_weight": line.values["engine_bits_per_weight"],
        "decode_tok_s": _median(one.decode),
        "decode_tok_s_ci": _interval(one.decode),
        "prefill_tok_s": _median(one.prefill),
        "served_tok_s": _median(one.served),
        "perplexity": line.values["perplexity"],
        "perplexity_delta": line.delta.value if line.delta else None,
        "kld_mean": line.values["kld_mean"],
        "memory_bytes": memory_bytes(line),
        "disk_bytes": line.values["disk_bytes"],
        "doubts": [doubt.words for doubt in one.doubts],
        "notes": list(one.notes),
    }


def _median(rate: Rate | None) -> float | None:
    return rate.median if rate else None


def _interval(rate: Rate | None) -> list[float] | None:
    return [*rate.interval] if rate and rate.interval else None
