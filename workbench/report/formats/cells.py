"""What a table looks like to people: its columns, what stands above it and below.

CSV and JSON are for programs: `objects(table)` in SI units, nothing rounded. Terminal and markdown are
for people and share their cells; only here do GiB and MiB exist, one unit a column so that numbers can be
compared by eye, and the field's shorthand (`pp512`, `tg64 @ d512`, `t/s`, as llama-bench prints them).
Whatever comes out of a recipe or an engine is text to be shown, not markup: it is escaped for the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from workbench.records import Evaluation
from workbench.report.doubts import quality_missing
from workbench.report.metrics import METRICS, Column, Metric
from workbench.report.selection import BASE
from workbench.report.speeds import further_rates
from workbench.report.table import Line, Score, Table, shared_settings, workload

MISSING = "–"
LONGEST_REASON = 400
"""Characters of an error or warning shown to people; CSV and JSON have all of it."""
BINARY = {"GiB": 2.0**30, "MiB": 2.0**20, "KiB": 2.0**10}


@dataclass(frozen=True)
class TextColumn:
    """Heading lines and one cell for each line of the table."""

    heading: tuple[str, ...]
    cells: tuple[str, ...]
    number: bool = True


def shown_columns(table: Table, detail: int) -> list[TextColumn]:
    """`detail` 3: all; 2: without the spread of the speeds and the errors of the divergence; 1: without divergence
    and agreement; 0: without the perplexity's error too."""
    lines = table.lines
    columns = [
        TextColumn(("variant",), tuple(_plain(line.row.artifact.variant) for line in lines), number=False),
        TextColumn(("backend",), tuple(_plain(line.row.backend) for line in lines), number=False),
    ]
    for column in table.varying:
        cells = tuple(_plain(column.text(line.row)) or MISSING for line in lines)
        columns.append(TextColumn((_plain(column.name),), cells, number=False))
    for metric in METRICS.values():
        if metric.column and (
            metric.column.printed == "always"
            or (metric.column.printed == "where measured" and any(line.values[metric.name] for line in lines))
        ):
            columns.append(_plain_metric(lines, metric, metric.column, detail > 2))
    for name, own in table.sets.items():
        columns += _quality(own.lines, detail, (_plain(name),) if len(table.sets) > 1 else ())
    for name in table.tasks:
        scores = [line.tasks.get(name) for line in lines]
        columns.append(TextColumn((_plain(name), "acc %"), tuple(_accuracy(score, detail > 1) for score in scores)))
        if detail > 0:
            cells = tuple(_accuracy_delta(line, score) for line, score in zip(lines, scores, strict=True))
            columns.append(TextColumn((_plain(name), "Δ acc"), cells))
    # A line that has no numbers says why in the last place for one.
    reasons = ["cannot run" if line.row.unsupported else "failed" if line.row.error else None for line in lines]
    last = columns[-1]
    columns[-1] = TextColumn(last.heading, tuple(why or cell for why, cell in zip(reasons, last.cells, strict=True)))
    if table.footnotes:
        marks = tuple(",".join(map(str, line.footnotes)) for line in lines)
        columns.append(TextColumn(("note",), marks, number=False))
    return columns


def _quality(lines: Sequence[Line], detail: int, name: tuple[str, ...]) -> list[TextColumn]:
    """The columns of one evaluation set, headed by its name where there are several."""
    columns = [
        TextColumn((*name, "ppl"), tuple(_perplexity(line, detail > 0) for line in lines)),
        TextColumn((*name, "Δ ppl"), tuple(map(_delta, lines))),
    ]
    if detail > 1 and any(line.values["kld_mean"] is not None for line in lines):
        columns.append(TextColumn((*name, "KLD"), tuple(_divergence(line, detail > 2) for line in lines)))
        columns.append(TextColumn((*name, "same top", "%"), tuple(_agreement(line, detail > 2) for line in lines)))
    return columns


def _plain_metric(lines: Sequence[Line], metric: Metric, column: Column, with_interval: bool) -> TextColumn:
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
    cells = [MISSING if value is None else format(value / scale, spec) for value in values]
    if with_interval and metric.samples:
        spreads = [_spread(line, metric.name) for line in lines]
        breadth = max(map(len, spreads), default=0)
        cells = [f"{cell} {spread.rjust(breadth)}".strip() for cell, spread in zip(cells, spreads, strict=True)]
    return TextColumn((*heading, unit) if unit else heading, tuple(cells))


def _workload_heading(lines: Sequence[Line], name: str) -> tuple[str, ...]:
    """A speed's heading as llama-bench has it, where all lines are of one workload."""
    workloads = {workload(line.row) for line in lines}
    if len(workloads) > 1:
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


def _delta(line: Line) -> str:
    """The difference to the base, `~` before one below the noise floor."""
    if line.delta is None:
        return MISSING
    if line.row.artifact.method == BASE:
        return "0"
    spec = _spec(line.delta.value)
    return f"{'~' if line.below_noise_floor else ''}{line.delta.value:+{spec}}{_error(line.delta.se, spec)}"


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


def title_of(table: Table) -> str:
    bases = dict.fromkeys(line.row.base for line in table.lines)
    devices = dict.fromkeys(line.row.measurement.device for line in table.lines if line.row.measurement)
    where = f" ({', '.join(devices)})" if devices else ""
    return _plain(f"{', '.join(bases)} on {table.machine}{where}")


def subtitle(table: Table) -> list[str]:
    texts = []
    points = {workload(line.row) for line in table.lines}
    repeats = {line.row.workload.repeats for line in table.lines}
    if len(points) == 1:
        prompt_tokens, new_tokens, batch = points.pop()
        count = f", {repeats.pop()} repeats" if len(repeats) == 1 else ""
        texts.append(f"speed: {prompt_tokens} prompt tokens, then {new_tokens} new ones, batch {batch}{count}")
    for own in table.sets.values():
        if e := own.evaluation:
            windows = f"{e.windows} windows of {e.window} tokens"
            texts.append(f"perplexity: {e.name}, {windows}, {_convention(e)}, {e.scored_tokens} tokens")
    if table.tasks:
        asked = {
            name: max((line.tasks[name].accuracy.windows for line in table.lines if name in line.tasks), default=0)
            for name in table.tasks
        }
        counts = ", ".join(f"{name}, {count} items" for name, count in asked.items())
        texts.append(f"accuracy: {counts}; Δ acc: to the base, paired by item; 95 % intervals in brackets")
    texts.append("± after a speed: 95 % interval of the median; elsewhere: one standard error, by windows")
    if any(line.values["kld_mean"] is not None for line in table.lines):
        texts.append("KLD: mean divergence from the base, nats a token; same top: its likeliest token is the base's")
    rest = [line for own in table.sets.values() for line in own.lines if line.row.artifact.method != BASE]
    if any(line.below_noise_floor or any(score.below_noise_floor for score in line.tasks.values()) for line in rest):
        texts.append("~: not to be told from the base, by divergence or perplexity: engines or texts differ as much")
    return [_plain(text) for text in texts]


def _convention(e: Evaluation) -> str:
    """Which positions were scored, as a recipe says it, and whose custom that is."""
    if e.score == "strided" and e.windows > 1:
        # The first window is scored whole, each later one in the tokens new to it.
        stride = (e.scored_tokens - (e.window - 1)) / (e.windows - 1)
        return f"strided by {stride:g} scored"
    customs = {"second-half": " (llama.cpp's convention)", "all": " (the papers' convention)"}
    return f"{e.score} scored{customs.get(e.score, '')}"


def remarks_of(table: Table) -> list[str]:
    texts = []
    for name, floor in [(name, floor) for name, own in table.sets.items() for floor in own.noise_floors]:
        where = "" if table.sets[name] is table.first else f" on {name}"
        texts.append(
            f"noise floor{where}: {floor.base} has perplexity {floor.low:.4f} to {floor.high:.4f} on "
            f"{', '.join(floor.backends)}: {100 * floor.relative:.3f} % apart"
        )
        if floor.divergences:
            each = [f"{backend} {format(value, '.1e') if value else 0}" for backend, value in floor.divergences]
            texts.append(f"noise floor{where}: divergence of {floor.base} from its own reference: {', '.join(each)}")
    missing = dict.fromkeys(why for line in table.lines if (why := quality_missing(line.row)))
    return [_plain(text) for text in (*texts, *missing, *_rates(table), *_settings(table), *table.notes)]


def _rates(table: Table) -> list[str]:
    """A line for each row that was timed at further points (llama-bench's shorthand)."""
    texts = []
    for line in table.lines:
        found = []
        for rate in further_rates(line.row):
            half = max(rate.interval[1] - rate.median, rate.median - rate.interval[0]) if rate.interval else 0
            error = "" if not half else f" ±{half / rate.median:.1%}" if half < rate.median else " ±100%+"
            found.append(f"{rate.name} {rate.median:.1f}{error}")
        if found:
            texts.append(f"{line.row.artifact.variant} on {line.row.backend}, t/s: {', '.join(found)}")
    return texts


def _settings(table: Table) -> list[str]:
    return [
        f"{backend}: {', '.join(spoken)}"
        for backend, shared in shared_settings(table).items()
        if (spoken := [f"{name} {value}" for name, value in shared.items() if isinstance(value, str | int)])
    ]


def _plain(text: str) -> str:
    """One line that a terminal can only print: no control characters, nothing that cannot be encoded."""
    one_line = " ".join(re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text).split())
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in one_line)


def short_text(reason: str) -> str:
    text = _plain(reason)
    if len(text) <= LONGEST_REASON:
        return text
    # A log's first words say what failed, its last ones why.
    return f"{text[: LONGEST_REASON // 2]} … {text[-LONGEST_REASON // 2 :]}"
