"""Rows seen together: which may stand side by side, in what order, with what deltas and doubts.

Numbers of other machines, other evaluation tokens or another way of measuring are not comparable, so one
table holds one of each and says how many rows it left out. Deltas are taken here, never stored: against
the base on the same backend, over the same windows. Divergences are from one reference of the base; a row
that was compared with another shows none. Nothing is dropped silently: a pair that cannot run and a job
that failed keep their lines, with the reason as a footnote.

**Below the noise floor** is a perplexity delta that two doubts do not leave standing. Either its size is at
most the spread of the base's own perplexity over the engines, which saw the same tokens: then another engine
alone would change as much. Or zero lies in its 95 % interval (paired, by Student's t, which is 1.96 standard
errors for many windows): then another text might turn it round. Where neither is so but one of the two is not
known (the base scored on one engine only, or in one window), the answer is not known either (None).

A table is data; what it looks like is `formats.py`. Rejected: a data frame (an import of a second for a
few dozen lines), and one table a backend (the question is which backend, too).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from workbench.errors import UserError, unknown
from workbench.records import Evaluation, Row, Task, digest, to_json
from workbench.report import metrics, statistics
from workbench.report.statistics import Estimate
from workbench.report.store import machine_of

OF_QUALITY = ("perplexity", *metrics.OF_THE_REFERENCE, "bits_per_byte")
"""The metrics that an evaluation set gives."""

BASE = "base"
"""The method of the unquantized model."""


@dataclass(frozen=True)
class Score:
    """How a row did at a task."""

    accuracy: Estimate
    delta: Estimate | None
    """To the base on the same backend, paired by item; of the base itself zero."""
    below_noise_floor: bool | None
    """Whether zero lies in the delta's 95 % interval: other items might turn it round."""


@dataclass(frozen=True)
class Line:
    """One row with what follows from its neighbours."""

    row: Row
    values: dict[str, float | None]
    """By name of `METRICS`."""
    errors: dict[str, float | None]
    """One standard error, by name of the metrics that have one."""
    delta: Estimate | None
    """To the base on the same backend; of the base itself zero."""
    below_noise_floor: bool | None
    """Whether the delta is (module docstring); None without a delta, or where it cannot be said."""
    prefill_interval: tuple[float, float] | None
    decode_interval: tuple[float, float] | None
    warnings: tuple[str, ...]
    footnotes: tuple[int, ...]
    """Numbers, from 1, into the table's `footnotes`."""
    tasks: dict[str, Score] = field(default_factory=dict)
    """By name, of those the row was asked."""


@dataclass(frozen=True)
class Column:
    """An identity column shown because its values differ (llama-bench's rule)."""

    name: str
    text: Callable[[Row], str]


@dataclass(frozen=True)
class NoiseFloor:
    """How far one base differs between engines that saw the same tokens."""

    base: str
    backends: tuple[str, ...]
    low: float
    """Perplexity."""
    high: float
    divergences: tuple[tuple[str, float], ...]
    """(backend, KLD mean from the base's reference in nats a token) where it was compared with one: what an
    engine's arithmetic and precision cost alone."""

    @property
    def spread(self) -> float:
        """The difference in perplexity that engines alone make."""
        return self.high - self.low

    @property
    def relative(self) -> float:
        """The spread as a fraction of the lowest."""
        return self.high / self.low - 1


@dataclass(frozen=True)
class Further:
    """What the same rows say on another evaluation set of the recipe."""

    evaluation: Evaluation
    lines: tuple[Line, ...]
    """One for each line of the table, in its order; those not scored on these tokens have no numbers of quality."""
    noise_floors: tuple[NoiseFloor, ...]


@dataclass(frozen=True)
class Table:
    """Comparable rows of one machine, ready to be rendered."""

    machine: str
    evaluation: Evaluation | None
    lines: tuple[Line, ...]
    varying: tuple[Column, ...]
    footnotes: tuple[str, ...]
    noise_floors: tuple[NoiseFloor, ...]
    """One a base that was scored on two or more backends."""
    notes: tuple[str, ...]
    """What was left out, and what the numbers rest on."""
    further: dict[str, Further] = field(default_factory=dict)
    """Other evaluation sets by name, where the recipe has several; as in its newest row."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks by name; as in the newest row."""


def build(
    rows: Sequence[Row], machine: str | None = None, recipe: str | None = None, evaluation: str | None = None
) -> Table:
    """The table of the newest comparable rows, or of those of the named machine, recipe and evaluation digest.

    Bases come first, then variants in the order first seen; each with its backends in the order first
    seen. Of several rows of one pair (another engine version, another calibration) the latest is shown,
    or the latest that was measured if a later try of the same files failed.
    Raises `UserError` if there is no row, or none of what was named.
    """
    if not rows:
        raise UserError("nothing measured yet: run `workbench run RECIPE`")
    notes: list[str] = []
    own = list(rows)
    if machine is not None:
        own = _named(own, "machine", machine, machine_of)
    if recipe is not None:
        own = _named(own, "recipe", recipe, lambda row: row.recipe)
    if evaluation is not None:
        own = _named(own, "evaluation", evaluation, _evaluation_digest)
    lead = max(own, key=_age)
    rows = _of_recipe(rows, own) if recipe is not None else list(rows)
    rows = _like(rows, lead, "machine", machine_of, notes)
    rows = _like(rows, lead, "measurement version", lambda row: str(row.measurement_version), notes)
    rows = _like_evaluation(rows, lead, notes)
    rows = _latest_of_each_pair(rows, notes)
    rows = _ordered(rows)

    footnotes: dict[str, int] = {}
    lines, floors = _lines(rows, footnotes)
    lines = tuple(replace(line, tasks=_scores(line.row, lead, rows)) for line in lines)
    further = {}
    for name, test in lead.evaluations.items():
        further[name] = Further(test, *_lines([_on(row, name, test) for row in rows], {}))
    for base in dict.fromkeys(line.row.base for line in lines if line.values["perplexity"] is not None):
        if base not in {floor.base for floor in floors}:
            notes.append(f"noise floor unknown: {base} itself was not scored on two backends")
    return Table(
        machine=machine_of(rows[0]),
        evaluation=next((row.evaluation for row in rows if row.evaluation), None),
        lines=lines,
        varying=_varying(rows),
        footnotes=tuple(footnotes),
        noise_floors=floors,
        notes=tuple(notes),
        further=further,
        tasks=lead.tasks,
    )


def objects(table: Table) -> list[dict[str, Any]]:
    """One flat object a line: SI units, None where not measured, never NaN.

    `*_ci` are pairs (95 %, of the median), `*_se` one standard error. `evaluations` has the quality on further sets by
    name, under the keys of the first; `tasks` accuracies by name, None for what a row was not asked.
    """
    found = []
    for place, line in enumerate(table.lines):
        record = _object(line)
        record["evaluations"] = {name: _quality(each.lines[place]) for name, each in table.further.items()}
        record["tasks"] = {name: _score(line.tasks.get(name), task) for name, task in table.tasks.items()}
        found.append(record)
    return found


def _quality(line: Line) -> dict[str, Any]:
    """What `_object` says of quality."""
    test = line.row.evaluation
    return {
        **{name: line.values[name] for name in OF_QUALITY},
        **{f"{name}_se": error for name, error in line.errors.items()},
        "perplexity_delta": line.delta.value if line.delta else None,
        "perplexity_delta_se": line.delta.se if line.delta else None,
        "below_noise_floor": line.below_noise_floor,
        "nonfinite_tokens": metrics.nonfinite(line.row),
        "evaluation_digest": test.digest if test else None,
        "window": test.window if test else None,
        "score": test.score if test else None,
        "scored_tokens": test.scored_tokens if test else None,
    }


def _score(score: Score | None, task: Task) -> dict[str, Any]:
    delta = score.delta if score else None
    return {
        "accuracy": score.accuracy.value if score else None,
        "accuracy_se": score.accuracy.se if score else None,
        "accuracy_delta": delta.value if delta else None,
        "accuracy_delta_se": delta.se if delta else None,
        "below_noise_floor": score.below_noise_floor if score else None,
        "items": score.accuracy.windows if score else None,
        "task_digest": task.digest,
    }


def workload(row: Row) -> tuple[int, int, int]:
    """Prompt tokens, new tokens and batch that the row's speed columns are about."""
    point = metrics.headline(row) or row.workload
    return point.prompt_tokens, point.new_tokens, point.batch


def device(row: Row) -> str | None:
    """Where it ran; of a job that never got so far, where it was to run, if its options say."""
    wanted = row.options.get("device")
    return row.measurement.device if row.measurement else wanted if isinstance(wanted, str) else None


def quality_missing(row: Row) -> str | None:
    """Why a measured row has no quality, where that is meant: weights that were drawn at random say nothing."""
    if row.measurement is None or row.measurement.quality is not None:
        return None
    source = row.artifact.provenance.get("source")
    if isinstance(source, dict) and source.get("config"):
        return "no quality: the base has random weights of a given shape, so only speed and memory mean anything"
    return "no quality: the recipe has no evaluation" if row.evaluation is None else None


def _object(line: Line) -> dict[str, Any]:
    row = line.row
    prompt_tokens, new_tokens, batch = workload(row)
    return {
        "machine": machine_of(row),
        "recipe": row.recipe,
        "base": row.base,
        "variant": row.artifact.variant,
        "method": row.artifact.method,
        "format": row.artifact.format,
        "backend": row.backend,
        "device": device(row),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        **line.values,
        **{f"{name}_se": error for name, error in line.errors.items()},
        "perplexity_delta": line.delta.value if line.delta else None,
        "perplexity_delta_se": line.delta.se if line.delta else None,
        "below_noise_floor": line.below_noise_floor,
        "nonfinite_tokens": metrics.nonfinite(row),
        "points": {
            point.name: {"median": point.median, "ci": list(point.interval) if point.interval else None}
            for point in metrics.points(row)
        },
        "quality_missing": quality_missing(row),
        "prefill_tok_s_ci": list(line.prefill_interval) if line.prefill_interval else None,
        "decode_tok_s_ci": list(line.decode_interval) if line.decode_interval else None,
        "warnings": list(line.warnings),
        "error": row.error,
        "unsupported": row.unsupported,
        "evaluation": row.evaluation.name if row.evaluation else None,
        "evaluation_digest": row.evaluation.digest if row.evaluation else None,
        "started_at": row.started_at,
        "key": row.key,
    }


def _lines(rows: Sequence[Row], footnotes: dict[str, int]) -> tuple[tuple[Line, ...], tuple[NoiseFloor, ...]]:
    """The rows with what follows from each other, and what their bases say of the noise."""
    references = _references(rows)
    values = [_values(row, references.get(row.base)) for row in rows]
    floors = _noise_floors(rows, values)
    lines = tuple(
        _line(row, own, rows, references.get(row.base), floors, footnotes)
        for row, own in zip(rows, values, strict=True)
    )
    return lines, floors


def _on(row: Row, name: str, test: Evaluation) -> Row:
    """The row as if a further evaluation set were its only one; without quality if that had other tokens."""
    own = row.evaluations.get(name)
    same = own is not None and own.digest == test.digest
    found = row.measurement
    quality = found.qualities.get(name) if found and same else None
    return replace(row, evaluation=own if same else None, measurement=found and replace(found, quality=quality))


def _scores(row: Row, lead: Row, rows: Sequence[Row]) -> dict[str, Score]:
    """The row's tasks by name, of those that `lead` has, with the same items."""
    found = {}
    for name, task in lead.tasks.items():
        accuracy = metrics.task_accuracy(row, name)
        if accuracy is None or row.tasks[name].digest != task.digest:
            continue
        base = _base_of(row, rows, partial(_was_asked, name=name))
        delta = metrics.task_delta(row, base, name) if base else None
        interval = statistics.interval(delta) if delta else None
        below = interval[0] <= 0 <= interval[1] if interval else None
        found[name] = Score(accuracy, delta, below)
    return found


def _values(row: Row, reference: str | None) -> dict[str, float | None]:
    """By metric; those of another reference than the table's are left out."""
    other = metrics.reference(row) != reference
    return {
        name: None if other and name in metrics.OF_THE_REFERENCE else metric.value(row)
        for name, metric in metrics.METRICS.items()
    }


def _references(rows: Sequence[Row]) -> dict[str, str]:
    """The reference that divergences of each base are from: that of the newest row compared with any."""
    found = {}
    for row in sorted(rows, key=_age):
        digest_of = metrics.reference(row)
        if digest_of:
            found[row.base] = digest_of
    return found


def _below(delta: Estimate | None, floor: NoiseFloor | None) -> bool | None:
    """Whether a delta is below the noise floor, as the module docstring defines it."""
    if delta is None:
        return None
    interval = statistics.interval(delta)
    if (floor and abs(delta.value) <= floor.spread) or (interval and interval[0] <= 0 <= interval[1]):
        return True
    return False if floor and interval else None


def _line(
    row: Row, values: dict[str, float | None], rows: Sequence[Row], reference: str | None,
    floors: Sequence[NoiseFloor], footnotes: dict[str, int],
) -> Line:  # fmt: skip
    base = _base_of(row, rows)
    delta = metrics.perplexity_delta(row, base) if base else None
    warnings = _warnings(row, values["perplexity"], base, delta)
    if reference and metrics.reference(row) not in (None, reference):
        warnings += (
            f"compared with another reference of the base ({metrics.reference(row)}, not {reference}): "
            "measure it again to see its divergence",
        )
    reasons = [row.unsupported or "", row.error or "", *warnings]
    return Line(
        row=row,
        values=values,
        errors={
            name: metric.error(row) if values[name] is not None else None
            for name, metric in metrics.METRICS.items()
            if metric.error
        },
        delta=delta,
        below_noise_floor=_below(delta, next((floor for floor in floors if floor.base == row.base), None)),
        prefill_interval=metrics.prefill_interval(row),
        decode_interval=metrics.decode_interval(row),
        warnings=warnings,
        footnotes=tuple(footnotes.setdefault(text, len(footnotes) + 1) for text in reasons if text),
    )


def _warnings(row: Row, own: float | None, base: Row | None, delta: Estimate | None) -> tuple[str, ...]:
    found = [*row.artifact.warnings, *(row.measurement.warnings if row.measurement else ()), *row.warnings]
    if own is not None and base is None:
        found.append(f"the base has no perplexity on {row.backend}, so there is no delta")
    elif own is not None and base is not None and not metrics.same_tokens(row, base):
        found.append(f"the base on {row.backend} was scored on other tokens, so there is no delta")
    elif delta and base is not None and base is not row and (lost := metrics.nonfinite(base)):
        found.append(f"the delta leaves out tokens whose logits of the base on {row.backend} are not finite ({lost})")
    return tuple(dict.fromkeys(text for text in found if text))


def _was_scored(row: Row) -> bool:
    return metrics.perplexity(row) is not None


def _was_asked(row: Row, *, name: str) -> bool:
    return metrics.task_accuracy(row, name) is not None


def _base_of(row: Row, rows: Sequence[Row], measured: Callable[[Row], bool] = _was_scored) -> Row | None:
    """The base's row on the same backend that was scored, with the same options if there is one."""
    if row.artifact.method == BASE:
        return row if measured(row) else None
    candidates = [
        other
        for other in rows
        if other.artifact.method == BASE and other.base == row.base and other.backend == row.backend and measured(other)
    ]
    return min(
        candidates, key=lambda other: (other.options != row.options, other.workload != row.workload), default=None
    )


def _noise_floors(rows: Sequence[Row], values: Sequence[dict[str, float | None]]) -> tuple[NoiseFloor, ...]:
    scores: dict[str, dict[str, list[float]]] = {}
    divergences: dict[str, list[tuple[str, float]]] = {}
    for row, own in zip(rows, values, strict=True):
        perplexity, divergence = own["perplexity"], own["kld_mean"]
        if row.artifact.method == BASE and perplexity is not None:
            scores.setdefault(row.base, {}).setdefault(row.backend, []).append(perplexity)
            if divergence is not None:
                divergences.setdefault(row.base, []).append((row.backend, divergence))
    floors = []
    for base, by_backend in scores.items():
        if len(by_backend) > 1:
            every = [value for scored in by_backend.values() for value in scored]
            found = tuple(divergences.get(base, ()))
            floors.append(NoiseFloor(base, tuple(by_backend), min(every), max(every), found))
    return tuple(floors)


def _named(rows: list[Row], thing: str, wanted: str, name: Callable[[Row], str]) -> list[Row]:
    kept = [row for row in rows if name(row) == wanted]
    if not kept:
        raise unknown(thing, wanted, (name(row) for row in rows if name(row)), "results")
    return kept


def _of_recipe(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """A recipe's own rows, and its bases' rows from other recipes: work done once is not done again."""
    recipe, bases = own[0].recipe, {row.base for row in own}
    return [row for row in rows if row.recipe == recipe or (row.artifact.method == BASE and row.base in bases)]


def _like(rows: list[Row], lead: Row, thing: str, name: Callable[[Row], str], notes: list[str]) -> list[Row]:
    """The rows that agree with `lead` in what `name` says; the others are counted in a note."""
    others = Counter(name(row) for row in rows if name(row) != name(lead))
    if others:
        notes.append(_left_out(sum(others.values()), f"of another {thing} ({', '.join(others)})"))
    return [row for row in rows if name(row) == name(lead)]


def _like_evaluation(rows: list[Row], lead: Row, notes: list[str]) -> list[Row]:
    """The rows scored on the tokens of `lead`, and those of the same bases that were to be scored on none."""
    wanted = _evaluation_digest(lead)
    bases = {row.base for row in rows if wanted and _evaluation_digest(row) == wanted} or {lead.base}
    kept: list[Row] = []
    others: list[Row] = []
    for row in rows:
        own = _evaluation_digest(row)
        comparable = own == wanted if own else row.base in bases
        (kept if comparable else others).append(row)
    if others:
        names = dict.fromkeys(
            f"{row.evaluation.name} {row.evaluation.digest}" if row.evaluation else row.base for row in others
        )
        notes.append(_left_out(len(others), f"of another evaluation or base ({', '.join(names)})"))
    return kept


def _evaluation_digest(row: Row) -> str:
    return row.evaluation.digest if row.evaluation else ""


def _latest_of_each_pair(rows: list[Row], notes: list[str]) -> list[Row]:
    pairs: dict[str, Row] = {}
    measured: dict[str, Row] = {}
    for row in rows:
        # An option at its engine's default is null, and absent from rows that are older than the option.
        chosen = {key: value for key, value in row.options.items() if value is not None}
        name = digest([row.base, row.artifact.variant, row.backend, chosen, to_json(row.workload)])
        if name not in pairs or _age(row) >= _age(pairs[name]):
            pairs[name] = row
        if row.measurement and (name not in measured or _age(row) >= _age(measured[name])):
            measured[name] = row
    for name, row in pairs.items():
        good = measured.get(name)
        if row.error and good and good.artifact.digest == row.artifact.digest:
            pairs[name] = good
            notes.append(
                f"{row.artifact.variant} on {row.backend} was tried again and failed ({row.error}): what was measured "
                "before is shown"
            )
    if len(pairs) < len(rows):
        notes.append(_left_out(len(rows) - len(pairs), "superseded by a later one of the same variant and backend"))
    return list(pairs.values())


def _left_out(count: int, why: str) -> str:
    return f"{count} row{'s' if count > 1 else ''} not shown: {why}"


def _ordered(rows: list[Row]) -> list[Row]:
    """Bases first, then variants and backends as their recipe has them, whatever order they were measured in."""
    recipes = _places(row.recipe for row in rows)
    rows = sorted(rows, key=lambda row: (recipes[row.recipe], row.place))
    bases, variants, backends = (
        _places(row.base for row in rows),
        _places(row.artifact.variant for row in rows),
        _places(row.backend for row in rows),
    )
    return sorted(
        rows,
        key=lambda row: (
            bases[row.base],
            row.artifact.method != BASE,
            variants[row.artifact.variant],
            backends[row.backend],
        ),
    )


def _places(names: Iterable[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _age(row: Row) -> float:
    """Seconds since 1970; a row without a readable time is the oldest."""
    try:
        moment = datetime.fromisoformat(row.started_at)
    except ValueError:
        return -math.inf
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _varying(rows: Sequence[Row]) -> tuple[Column, ...]:
    columns = [
        Column("base", lambda row: row.base),
        Column("device", lambda row: device(row) or ""),
        Column("workload", lambda row: "pp{} tg{} b{}".format(*workload(row))),
    ]
    shown = [column for column in columns if len({column.text(row) for row in rows} - {""}) > 1]
    # Engines differ in their options by nature; one is worth a column only where it tells two lines apart.
    pairs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row.base, row.artifact.variant, row.backend), []).append(row)
    for key in dict.fromkeys(key for row in rows for key in row.options):
        if any(len({_option(row, key=key) for row in group}) > 1 for group in pairs.values()):
            shown.append(Column(key, partial(_option, key=key)))
    return tuple(shown)


def _option(row: Row, *, key: str) -> str:
    value = row.options.get(key)
    return "" if value is None else str(value)
