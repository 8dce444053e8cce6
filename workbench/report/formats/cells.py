"""The columns that people see: cells in the units and with the digits that are read, and what goes where there is no
room.

CSV and JSON are for programs: `objects(table)` in SI units, nothing rounded. Terminal and markdown are
for people and share their cells; only here do GiB and MiB exist, one unit a column so that numbers can be
compared by eye, and the field's shorthand (`pp512`, `tg64 @ d512`, `t/s`, as llama-bench prints them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from workbench.report.formats.data import chosen
from workbench.report.formats.prose import plain
from workbench.report.metrics import METRICS, Column, Metric
from workbench.report.selection import BASE
from workbench.report.table import Line, Score, Table, workload
from workbench.report.units import amount

MISSING = "–"
BINARY = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10}
STAYS = 99
RANKS = {
    "load_s": 0,
    "disk_bytes": 1,
    "bits_per_weight": 4,
    "peak_rss_bytes": 6,
    "peak_vram_bytes": 6,
    "prefill_tok_s": 9,
    "decode_tok_s": STAYS,
}
"""When a metric's column goes where there is no room, the least first: what a file's name tells, then what is of one
machine; intervals (10) and divergence (12) last."""


@dataclass(frozen=True)
class TextColumn:
    """Heading lines and one cell for each line of the table that ran."""

    heading: tuple[str, ...]
    cells: tuple[str, ...]
    number: bool = True
    rank: int = STAYS
    """When it goes where there is no room, the least first."""
    bare: tuple[str, ...] = ()
    """Its cells without their errors, if they have any."""
    bare_rank: int = STAYS
    """When the errors go."""

    @property
    def name(self) -> str:
        """What it is called in a sentence."""
        *words, last = self.heading
        return " ".join(words if words and last in (*BINARY, "s", "t/s", "%") else self.heading)


def shown_lines(lines: Sequence[Line]) -> list[Line]:
    """Those that have a line in print: pairs that cannot run are told below."""
    return [line for line in lines if not line.row.unsupported]


def shown_columns(table: Table, names: Sequence[str] = ()) -> list[TextColumn]:
    """The columns of a printed table, or those of these keys of `flattened`; `UserError` for one that is none."""
    lines = shown_lines(table.lines)
    columns = _identity(table, lines)
    if names:
        columns += _chosen(table, names)
    else:
        columns += _numbers(table, lines)
    marks = tuple(",".join(map(str, line.footnotes)) for line in lines)
    return columns + ([TextColumn(("note",), marks, number=False)] if any(marks) else [])


def _identity(table: Table, lines: Sequence[Line]) -> list[TextColumn]:
    texts = {"variant": [line.row.artifact.variant for line in lines], "backend": [line.row.backend for line in lines]}
    texts |= {column.name: [column.text(line.row) for line in lines] for column in table.varying}
    return [
        TextColumn((plain(name),), tuple(plain(text) or MISSING for text in cells), number=False)
        for name, cells in texts.items()
    ]


def _chosen(table: Table, names: Sequence[str]) -> list[TextColumn]:
    """Columns of any keys of `flattened`, each number in the unit of its metric."""
    records = [record for record in chosen(table, names) if record["unsupported"] is None]

    def cell(name: str, value: object) -> str:
        if isinstance(value, float | int) and not isinstance(value, bool):
            metric = METRICS.get(name.rpartition(".")[2])
            return amount(value, metric.unit if metric else "")
        return MISSING if value is None else plain(str(value))

    return [
        TextColumn(
            (plain(name),),
            tuple(cell(name, record.get(name)) for record in records),
            number=not any(isinstance(record.get(name), str) for record in records),
        )
        for name in names
    ]


def _numbers(table: Table, lines: Sequence[Line]) -> list[TextColumn]:
    columns = []
    for metric in METRICS.values():
        if metric.column and (
            metric.column.printed == "always"
            or (metric.column.printed == "where measured" and any(line.values[metric.name] for line in lines))
        ):
            columns.append(_plain_metric(lines, metric, metric.column))
    for name, own in table.sets.items():
        heading = (plain(name),) if len(table.sets) > 1 else ()
        columns += _quality(shown_lines(own.lines), heading, own is not table.first)
    for name in table.tasks:
        scores = [line.tasks.get(name) for line in lines]
        accuracies = [(_accuracy(score, True), _accuracy(score, False)) for score in scores]
        columns.append(_column((plain(name), "acc %"), accuracies, 7, 6))
        deltas = tuple(_accuracy_delta(line, score) for line, score in zip(lines, scores, strict=True))
        columns.append(TextColumn((plain(name), "Δ acc"), deltas, rank=7))
    return columns


def _column(heading: tuple[str, ...], cells: Sequence[tuple[str, str]], rank: int, bare_rank: int) -> TextColumn:
    """A column of cells with and without their errors."""
    whole, bare = (tuple(each) for each in zip(*cells, strict=True)) if cells else ((), ())
    return TextColumn(heading, whole, True, rank, bare if bare != whole else (), bare_rank)


def _quality(lines: Sequence[Line], name: tuple[str, ...], further: bool) -> list[TextColumn]:
    """The columns of one evaluation set, headed by its name where there are several; `further` ones go first."""
    columns = [
        _column((*name, "ppl"), [(_perplexity(line, True), _perplexity(line, False)) for line in lines], 8, 2),
        _column((*name, "Δ ppl"), [(_delta(line, True), _delta(line, False)) for line in lines], 11, 10),
    ]
    if any(line.values["kld_mean"] is not None for line in lines):
        divergences = [(_divergence(line, True), _divergence(line, False)) for line in lines]
        columns.append(_column((*name, "KLD"), divergences, 12, 11))
        same = [(_agreement(line, True), _agreement(line, False)) for line in lines]
        columns.append(_column((*name, "same top", "%"), same, 5, 3))
    if further:
        columns = [replace(column, rank=min(column.rank, 7), bare_rank=min(column.bare_rank, 7)) for column in columns]
    return columns


def _plain_metric(lines: Sequence[Line], metric: Metric, column: Column) -> TextColumn:
    """The column of a metric that needs no care of its own, headed by the workload where it is a speed."""
    values = [line.values[metric.name] for line in lines]
    heading, unit, spec, scale = tuple(column.heading.split()), column.unit, column.spec, column.scale
    if metric.unit == "B":
        largest = max((value or 0 for value in values), default=0)
        unit, scale = next((u, s) for u, s in BINARY.items() if largest >= 2 * s or u == "KiB")
        spec = ".1f"
    elif metric.samples:
        heading, unit = _workload_heading(lines, metric.name) or heading, "t/s"
    elif unit == "bit":
        unit = ""  # the heading has it
    bare = [MISSING if value is None else format(value / scale, spec) for value in values]
    if metric.name == "decode_tok_s":
        # The one column that always stays: a line without numbers says there why.
        bare = ["failed" if line.row.error else cell for line, cell in zip(lines, bare, strict=True)]
    spreads = [_spread(line, metric.name) if metric.samples else "" for line in lines]
    breadth = max(map(len, spreads), default=0)
    cells = [(f"{cell} {spread.rjust(breadth)}".strip(), cell) for cell, spread in zip(bare, spreads, strict=True)]
    return _column((*heading, unit) if unit else heading, cells, RANKS.get(metric.name, 0), 10)


def _workload_heading(lines: Sequence[Line], name: str) -> tuple[str, ...]:
    """A speed's heading as llama-bench has it, where all lines are of one workload."""
    workloads = {workload(line.row) for line in lines}
    if len(workloads) != 1:
        return ()
    prompt_tokens, new_tokens, batch = workloads.pop()
    many = f" b{batch}" if batch > 1 else ""
    return (
        (f"pp{prompt_tokens}{many}",) if name == "prefill_tok_s" else (f"tg{new_tokens}{many}", f"@ d{prompt_tokens}")
    )


def _spread(line: Line, name: str) -> str:
    interval, middle = line.intervals[name], line.values[name]
    if interval is None or not middle:
        return ""
    percent = 100 * max(interval[1] - middle, middle - interval[0]) / middle
    return f"±{percent:.1f}%" if percent < 9.95 else f"±{percent:.0f}%" if percent < 100 else "±100%+"


def _perplexity(line: Line, with_error: bool) -> str:
    value = line.values["perplexity"]
    if value is None:
        return MISSING
    return f"{value:{_spec(value)}}{_error(line.errors['perplexity'] if with_error else None, _spec(value))}"


def _error(se: float | None, spec: str, scale: float = 1) -> str:
    return "" if se is None else f" ±{se * scale:{spec}}"


def _delta(line: Line, with_error: bool) -> str:
    """The difference to the base, `~` before one below the noise floor."""
    if line.delta is None:
        return MISSING
    if line.row.artifact.method == BASE:
        return "0"
    spec = _spec(line.delta.value)
    error = _error(line.delta.se if with_error else None, spec)
    return f"{'~' if line.below_noise_floor else ''}{line.delta.value:+{spec}}{error}"


def _divergence(line: Line, with_error: bool) -> str:
    value = line.values["kld_mean"]
    if not value:
        return MISSING if value is None else "0"
    # From what rounding costs to what ruins a model are nine powers of ten.
    spec = ".4f" if value >= 5e-4 else ".1e"
    return f"{value:{spec}}{_error(line.errors['kld_mean'] if with_error else None, spec)}"


def _agreement(line: Line, with_error: bool) -> str:
    value = line.values["top1_agreement"]
    if value is None:
        return MISSING
    return f"{100 * value:.2f}{_error(line.errors['top1_agreement'] if with_error else None, '.2f', 100)}"


def _accuracy(score: Score | None, with_interval: bool) -> str:
    if score is None:
        return MISSING
    return f"{100 * score.accuracy.value:.1f}{_between(score.interval, '.1f') if with_interval else ''}"


def _between(interval: tuple[float, float], spec: str) -> str:
    """An interval of a share in brackets: of a few items it is lopsided, and wide where all or none are right."""
    return " ({:{spec}}..{:{spec}})".format(*(100 * end for end in interval), spec=spec)


def _accuracy_delta(line: Line, score: Score | None) -> str:
    if score is None or score.delta is None or score.delta_interval is None:
        return MISSING
    if line.row.artifact.method == BASE:
        return "0"
    mark = "~" if score.below_noise_floor else ""
    return f"{mark}{100 * score.delta.value:+.1f}{_between(score.delta_interval, '+.1f')}"


def _spec(value: float) -> str:
    size = abs(value)
    return ".3f" if size < 100 else ".1f" if size < 1e5 else ".2e"
