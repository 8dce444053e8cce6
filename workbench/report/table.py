"""Rows seen together: which may stand side by side, in what order, with what deltas and doubts.

Numbers of other machines, other evaluation tokens or another way of measuring are not comparable, so one
table holds one of each and says how many rows it left out. Deltas are taken here, never stored: against
the base on the same backend, over the same windows. Divergences are from one reference of the base; a row
that was compared with another shows none. Nothing is dropped silently: a pair that cannot run and a job
that failed keep their lines, with the reason as a footnote.

**Below the noise floor** is the delta of a variant whose quality two doubts do not let be told from the base's
(`quality.alike`). Either they differ by no more than the base itself does over the engines, which saw the same tokens:
then another engine alone would change as much. Or zero lies in the 95 % interval of the difference: then another text
might turn it round. Asked are the divergences, where there are any, and the perplexities. Where one of the doubts is
not known (the base scored on one engine only, or in one window), the answer is not known either (None).

A table is data; what it looks like is `formats/`. Rejected: to be a data frame (an import of a second for a few dozen
lines; `to_pandas` makes one), and one table a backend (the question is which backend, too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from workbench.errors import UserError
from workbench.records import Evaluation, Row, Task
from workbench.report import quality, speeds
from workbench.report.doubts import footnotes_of, warnings_of
from workbench.report.estimates import Estimate
from workbench.report.formats import FORMATS, data_frame
from workbench.report.lazily import Lazily
from workbench.report.metrics import METRICS, OF_THE_REFERENCE
from workbench.report.noise import NoiseFloor, noise_floors
from workbench.report.quality import Noise
from workbench.report.selection import (
    BASE,
    comparable_rows,
    differing,
    evaluation_digest,
    in_order,
    latest_of_each_pair,
    like_evaluation,
    named_rows,
    of_recipe,
    workload_words,
)
from workbench.report.store import machine_named, machine_of

if TYPE_CHECKING:
    import pandas

ERRORS = {name: metric.error for name, metric in METRICS.items() if metric.error}
SAMPLES = {name: metric.samples for name, metric in METRICS.items() if metric.samples}
Bases = dict[tuple[str, str], list[Row]]
"""By base and backend, the base's rows that have some value."""


@dataclass(frozen=True)
class Score:
    """How a row did at a task."""

    accuracy: Estimate
    interval: tuple[float, float]
    """95 % interval of the accuracy."""
    delta: Estimate | None
    """Difference to the base on the same backend, paired by item; zero for the base itself."""
    delta_interval: tuple[float, float] | None
    """95 % interval of the delta."""

    @property
    def below_noise_floor(self) -> bool | None:
        """Whether zero lies in the delta's interval: other items might turn it round."""
        return self.delta_interval and self.delta_interval[0] <= 0 <= self.delta_interval[1]


@dataclass(frozen=True)
class Line:
    """One row with what follows from its neighbours."""

    row: Row
    values: Mapping[str, float | None]
    """Values by name of the metric."""
    errors: Mapping[str, float | None]
    """One standard error of each value that has one, by name of the metric."""
    delta: Estimate | None
    """Difference of perplexity to the base on the same backend; zero for the base itself."""
    below_noise_floor: bool | None
    """Whether the delta is (module docstring); None where it cannot be said."""
    intervals: Mapping[str, tuple[float, float] | None]
    """95 % interval of each value that is a median of repeats, by name of the metric."""
    warnings: tuple[str, ...]
    lost_tokens: str | None = None
    """Why its quality is of fewer tokens than the base's in some engine, in words."""
    footnotes: tuple[int, ...] = ()
    """Numbers, from 1, into the table's `footnotes`."""
    tasks: dict[str, Score] = field(default_factory=dict)
    """Scores by name of the task, as far as the row was asked."""

    @cached_property
    def further(self) -> dict[str, speeds.Rate]:
        """Speeds at further lengths and batches, and of served requests, by name."""
        return {rate.name: rate for rate in speeds.further_rates(self.row)}


@dataclass(frozen=True)
class VaryingColumn:
    """An identity column shown because its values differ (llama-bench's rule)."""

    name: str
    text: Callable[[Row], str]


@dataclass(frozen=True)
class TableOnSet:
    """What the rows say on one evaluation set."""

    evaluation: Evaluation | None
    lines: tuple[Line, ...]
    """A line for each row, in the table's order; those not scored on these tokens have no numbers of quality."""
    noise_floors: tuple[NoiseFloor, ...]
    """A noise floor for each base that was scored on two or more backends."""


@dataclass(frozen=True, repr=False)
class Table:
    """Comparable rows of one machine, ready to be rendered."""

    machine: str
    sets: dict[str, TableOnSet]
    """By evaluation set, as in the newest row; the first is what is shown where there is room for one. One without a
    name where nothing was to be scored."""
    varying: tuple[VaryingColumn, ...]
    footnotes: tuple[str, ...]
    notes: tuple[str, ...]
    """What was left out, and what the numbers rest on."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """Tasks by name; as in the newest row of the newest's recipe that has them."""

    @property
    def first(self) -> TableOnSet:
        """What the rows say on the first evaluation set."""
        return next(iter(self.sets.values()))

    @property
    def lines(self) -> tuple[Line, ...]:
        """The rows on the first evaluation set."""
        return self.first.lines

    @cached_property
    def telling(self) -> dict[tuple[str, str], tuple[VaryingColumn, ...]]:
        """By variant and engine, those of the varying columns in which its lines differ."""
        alike: dict[tuple[str, str], list[Row]] = {}
        for line in self.lines:
            alike.setdefault((line.row.artifact.variant, line.row.backend), []).append(line.row)
        return {
            name: tuple(column for column in self.varying if len({column.text(row) for row in rows}) > 1)
            for name, rows in alike.items()
        }

    def to_pandas(self) -> pandas.DataFrame:
        """A row a line, SI units, NaN where not measured. Raises `UserError` without pandas."""
        return data_frame(self)

    def __str__(self) -> str:
        return FORMATS["terminal"](self)

    def __repr__(self) -> str:
        return f"<Table of {len(self.lines)} rows of {self.machine}>"  # all fields would be pages of samples

    def _repr_markdown_(self) -> str:
        return FORMATS["markdown"](self)  # what notebooks show


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
        own = named_rows(own, "machine", machine_named(own, machine), machine_of)
    if recipe is not None:
        own = named_rows(own, "recipe", recipe, lambda row: row.recipe)
    if evaluation is not None:
        own = named_rows(own, "evaluation", evaluation, evaluation_digest)
    lead = max(own, key=lambda row: row.started_at)
    rows = of_recipe(rows, own) if recipe is not None else list(rows)
    rows = comparable_rows(rows, lead, "machine", machine_of, notes)
    rows = comparable_rows(rows, lead, "measurement version", lambda row: str(row.measurement_version), notes)
    rows = like_evaluation(rows, lead, notes)
    rows = latest_of_each_pair(rows, notes)
    rows = in_order(rows)

    lines, floors = _lines(rows)
    # Not all of a recipe's rows have all of its tasks: an engine may be without the harness.
    of_one_recipe = [row for row in rows if row.recipe_digest == lead.recipe_digest]
    tasks = dict(lead.tasks)
    for row in sorted(of_one_recipe, key=lambda row: row.started_at, reverse=True):
        for name, task in row.tasks.items():
            tasks.setdefault(name, task)
    asked = {name: _bases(rows, partial(quality.task_accuracy, name=name)) for name in tasks}
    # What ran is numbered first: a text lists what cannot run apart, and needs no numbers for it.
    order = sorted(range(len(lines)), key=lambda place: bool(lines[place].row.unsupported))
    reasons = [[lines[k].row.unsupported, lines[k].row.error, *lines[k].warnings] for k in order]
    numbers, footnotes = footnotes_of([[text for text in each if text] for each in reasons])
    marks = dict(zip(order, numbers, strict=True))
    lines = tuple(
        replace(line, tasks=_scores(line.row, tasks, asked), footnotes=marks[k]) for k, line in enumerate(lines)
    )
    shown = next((row.evaluation for row in rows if row.evaluation), None)
    sets = {next(iter(lead.evaluations), shown.name if shown else ""): TableOnSet(shown, lines, floors)}
    for name, test in [*lead.evaluations.items()][1:]:
        sets[name] = TableOnSet(test, *_lines([_on(row, name, test) for row in rows]))
    known = {floor.base for floor in floors}
    for base in dict.fromkeys(line.row.base for line in lines if line.values["perplexity"] is not None):
        if base not in known:
            notes.append(f"noise floor unknown: {base} itself was not scored on two backends")
    return Table(
        machine=machine_of(rows[0]),
        sets=sets,
        varying=_varying(rows),
        footnotes=footnotes,
        notes=tuple(notes),
        tasks=tasks,
    )


def workload(row: Row) -> tuple[int, int, int]:
    """Prompt tokens, new tokens and batch that the row's speed columns are about."""
    speed = speeds.headline(row)
    if speed is None:
        prompt_tokens, batch = row.workload.points[0]
        return prompt_tokens, row.workload.new_tokens, batch
    return speed.prompt_tokens, speed.new_tokens, speed.batch


def shared_settings(table: Table) -> dict[str, dict[str, object]]:
    """For each backend, what all its measured lines really ran with."""
    found: dict[str, dict[str, object]] = {}
    for line in table.lines:
        if line.row.measurement:
            own = line.row.measurement.settings
            shared = found.setdefault(line.row.backend, own)
            found[line.row.backend] = {name: value for name, value in shared.items() if own.get(name) == value}
    return found


def _lines(rows: Sequence[Row]) -> tuple[tuple[Line, ...], tuple[NoiseFloor, ...]]:
    """The rows with what follows from each other, and what their bases say of the noise."""
    references = _references(rows)
    values = [_values(row, references.get(row.base)) for row in rows]
    floors = noise_floors(rows, values)
    bases, spreads = _bases(rows, quality.perplexity), {floor.base: floor for floor in floors}
    scored = [base for found in bases.values() for base in found]
    lines = tuple(
        _line(row, own, _base_of(row, bases), references.get(row.base), spreads.get(row.base), scored)
        for row, own in zip(rows, values, strict=True)
    )
    return lines, floors


def _on(row: Row, name: str, test: Evaluation) -> Row:
    """The row as if this evaluation set were its only one; without any if that had other tokens."""
    own = row.evaluations.get(name)
    return replace(row, evaluations={name: own} if own is not None and own.digest == test.digest else {})


def _scores(row: Row, tasks: Mapping[str, Task], bases: dict[str, Bases]) -> dict[str, Score]:
    """The row's scores at these tasks, of the same items; `bases` by task."""
    found = {}
    for name, task in tasks.items():
        accuracy, interval = quality.task_accuracy(row, name), quality.task_interval(row, name)
        if accuracy is None or interval is None or row.tasks[name].digest != task.digest:
            continue
        base = _base_of(row, bases[name])
        found[name] = Score(accuracy, interval, *(base and quality.task_delta(row, base, name) or (None, None)))
    return found


def _values(row: Row, reference: str | None) -> Mapping[str, float | None]:
    """A row's values by metric, without divergences from another reference than the table's."""
    other = quality.reference(row) != reference
    return Lazily(tuple(METRICS), lambda name: None if other and name in OF_THE_REFERENCE else METRICS[name].value(row))


def _references(rows: Sequence[Row]) -> dict[str, str]:
    """The reference that divergences of each base are from: that of the newest row compared with any."""
    ordered = sorted(rows, key=lambda row: row.started_at)
    return {row.base: found for row in ordered if (found := quality.reference(row))}


def _line(
    row: Row,
    values: Mapping[str, float | None],
    base: Row | None,
    reference: str | None,
    floor: NoiseFloor | None,
    scored: Sequence[Row],
) -> Line:
    delta = quality.perplexity_delta(row, base) if base else None
    warnings = warnings_of(row, values, base, delta)
    if reference and quality.reference(row) not in (None, reference):
        warnings += (
            f"compared with another reference of the base ({quality.reference(row)}, not {reference}): "
            "measure it again to see its divergence",
        )
    return Line(
        row=row,
        values=values,
        errors=Lazily(ERRORS, lambda name: ERRORS[name](row) if values[name] is not None else None),
        delta=delta,
        below_noise_floor=quality.alike(row, base, floor.noise if floor else Noise()) if base else None,
        intervals=Lazily(SAMPLES, lambda name: speeds.median_interval(row, SAMPLES[name])),
        warnings=warnings,
        lost_tokens=quality.lost_tokens(row, (other for other in scored if other.base == row.base)),
    )


def _bases(rows: Sequence[Row], value: Callable[[Row], object]) -> Bases:
    found: Bases = {}
    for row in rows:
        if row.artifact.method == BASE and value(row) is not None:
            found.setdefault((row.base, row.backend), []).append(row)
    return found


def _base_of(row: Row, bases: Bases) -> Row | None:
    """The base's row on the same backend, with the same options if there is one."""
    candidates = bases.get((row.base, row.backend), [])
    if row.artifact.method == BASE:
        return next((other for other in candidates if other is row), None)
    return min(
        candidates, key=lambda other: (other.options != row.options, other.workload != row.workload), default=None
    )


def _varying(rows: Sequence[Row]) -> tuple[VaryingColumn, ...]:
    columns = [
        VaryingColumn("base", lambda row: row.base),
        VaryingColumn("device", lambda row: row.device or ""),
        VaryingColumn("workload", lambda row: "pp{} tg{} b{}".format(*workload(row))),
    ]
    shown = [column for column in columns if len({column.text(row) for row in rows} - {""}) > 1]
    # Engines differ in their options by nature; one is worth a column only where it tells two lines apart.
    pairs: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        pairs.setdefault((row.base, row.artifact.variant, row.backend), []).append(row)
    for key in dict.fromkeys(key for row in rows for key in row.options):
        if any(len({_option(row, key=key) for row in group}) > 1 for group in pairs.values()):
            shown.append(VaryingColumn(key, partial(_option, key=key)))
    # So with what else a workload says: how often it was repeated, how many requests were served.
    for group in pairs.values():
        if len({tuple(column.text(row) for column in shown) for row in group}) < len(group):
            words = [workload_words(row.workload) for row in group]
            known = {column.name for column in shown}
            names = [name for name in differing(words) if name not in known]
            shown += [VaryingColumn(name, partial(_of_workload, key=name)) for name in names]
    return tuple(shown)


def _of_workload(row: Row, *, key: str) -> str:
    return str(workload_words(row.workload)[key])


def _option(row: Row, *, key: str) -> str:
    value = row.options.get(key)
    return "" if value is None else str(value)
