"""The table as data: CSV and JSON, SI units, one flat object a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence

from workbench.errors import check_known
from workbench.records import Task
from workbench.report import forms, loads, quality
from workbench.report.doubts import quality_missing
from workbench.report.loads import Figures
from workbench.report.metrics import METRICS
from workbench.report.store import machine_of
from workbench.report.table import Line, Score, Table, TableOnSet, workload


def comma_separated(table: Table, columns: Sequence[str] = ()) -> str:
    """CSV with a header: one record a line, empty where not measured, a pair as two columns; only `columns` if any are
    named."""
    records = _only(table, columns) if columns else [flattened(record) for record in objects(table)]
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def json_text(table: Table, columns: Sequence[str] = ()) -> str:
    """A JSON list of `objects(table)`: SI units, null where not measured, ASCII only; only the keys `columns` of
    `flattened` if any are named."""
    return json.dumps(_only(table, columns) if columns else objects(table), indent=2, allow_nan=False) + "\n"


def chosen(table: Table, names: Sequence[str]) -> list[dict[str, object]]:
    """Every line `flattened`. Raises `UserError` if one of the names is no key of any."""
    records = [flattened(record) for record in objects(table)]
    for name in names:
        check_known("column", name, dict.fromkeys(key for record in records for key in record))
    return records


def _only(table: Table, names: Sequence[str]) -> list[dict[str, object]]:
    return [{name: record.get(name) for name in ("variant", "backend", *names)} for record in chosen(table, names)]


def flattened(record: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """One of `objects` with a plain value a key: an interval `*ci` as `*ci_low` and `*ci_high`, a mapping as a key for
    each of its own (`options.kv_cache`, `evaluations.code.kld_mean`), a list as one text."""
    flat: dict[str, object] = {}
    for key, value in record.items():
        name = prefix + key
        if f"_{key}".endswith("_ci"):
            flat[f"{name}_low"], flat[f"{name}_high"] = value if isinstance(value, list) else (None, None)
        elif isinstance(value, dict):
            flat |= flattened(value, f"{name}.")
        else:
            text = "; ".join(map(str, value)) if isinstance(value, list) else value
            flat[name] = _encodable(text) if isinstance(text, str) else text
    return flat


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


OF_QUALITY = tuple(name for name, metric in METRICS.items() if metric.scored_on)
"""The metrics that an evaluation set gives."""


def objects(table: Table) -> list[dict[str, object]]:
    """One flat object a line: SI units, None where not measured, never NaN.

    `*_ci` are pairs (95 %, of the median), `*_se` one standard error. `options` is what the recipe asked of the engine,
    `settings` what it ran with; `points` has the speeds of further prompt lengths, batches and requests; `loads` what a
    server did under load; `evaluations` the quality on further sets by name, under the keys of the first; `tasks`
    accuracies by name, None for what a row was not asked; `notes` what stands below the table.
    """
    found = []
    for place, line in enumerate(table.lines):
        record = _object(line) | {"noise_floor": _noise_floor(table.first, line)}
        record["evaluations"] = {
            name: _quality(each.lines[place]) | {"noise_floor": _noise_floor(each, each.lines[place])}
            for name, each in [*table.sets.items()][1:]
        }
        record["tasks"] = {name: _score(line.tasks.get(name), task) for name, task in table.tasks.items()}
        record["notes"] = list(table.notes)
        found.append(record)
    return found


def _quality(line: Line) -> dict[str, object]:
    """What an evaluation set says of a line."""
    test = line.row.evaluation
    return {
        **{name: line.values[name] for name in OF_QUALITY},
        **_errors(line),
        "evaluation_digest": test.digest if test else None,
        "window": test.window if test else None,
        "score": test.score if test else None,
        "scored_tokens": test.scored_tokens if test else None,
    }


def _errors(line: Line) -> dict[str, object]:
    """How far the numbers of quality can be trusted."""
    return {
        **{f"{name}_se": error for name, error in line.errors.items()},
        "perplexity_delta": line.delta.value if line.delta else None,
        "perplexity_delta_se": line.delta.se if line.delta else None,
        "below_noise_floor": line.below_noise_floor,
        "nonfinite_tokens": quality.nonfinite(line.row),
    }


def _noise_floor(own: TableOnSet, line: Line) -> dict[str, object]:
    """How far engines alone move the line's base on a set: its perplexity, and each one's divergence."""
    floor = next((each for each in own.noise_floors if each.base == line.row.base), None)
    ends = {"low": floor.low, "high": floor.high} if floor else {"low": None, "high": None}
    return {**ends, "kld": dict(floor.divergences) if floor else {}}


def _score(score: Score | None, task: Task) -> dict[str, object]:
    delta = score.delta if score else None
    return {
        "accuracy": score.accuracy.value if score else None,
        "accuracy_se": score.accuracy.se if score else None,
        "accuracy_low": score.interval[0] if score else None,
        "accuracy_high": score.interval[1] if score else None,
        "accuracy_delta": delta.value if delta else None,
        "accuracy_delta_se": delta.se if delta else None,
        "below_noise_floor": score.below_noise_floor if score else None,
        "items": score.accuracy.windows if score else None,
        "task_digest": task.digest,
    }


def _load(own: Figures) -> dict[str, object]:
    """A load point, its quantiles as `ttft_s_p50`, `ttft_s_p90`, `ttft_s_p99`."""
    found: dict[str, object] = {}
    for name, value in vars(own).items():
        if name == "name":
            continue
        if name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
            found |= dict(zip((f"{name}_p50", f"{name}_p90", f"{name}_p99"), value or (None,) * 3, strict=True))
        else:
            found[name] = value
    return found


def _object(line: Line) -> dict[str, object]:
    row = line.row
    prompt_tokens, new_tokens, batch = workload(row)
    return {
        "machine": machine_of(row),
        "recipe": row.recipe,
        "base": row.base,
        "variant": row.artifact.variant,
        "method": row.artifact.method,
        "format": row.artifact.format,
        "container": forms.container(row),
        "weights_held": forms.held(row),
        "carried_from": forms.carried_from(row),
        "backend": row.backend,
        "device": row.device,
        "options": dict(row.options),
        "settings": {
            name: value
            for name, value in (row.measurement.settings if row.measurement else {}).items()
            if isinstance(value, str | int | float)
        },
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "batch": batch,
        **line.values,
        **_errors(line),
        "points": {
            rate.name: {"median": rate.median, "ci": list(rate.interval) if rate.interval else None}
            for rate in line.further.values()
        },
        "loads": {own.name: _load(own) for own in loads.all_figures(row)},
        "quality_missing": quality_missing(row),
        **{f"{name}_ci": list(interval) if interval else None for name, interval in line.intervals.items()},
        "warnings": list(line.warnings),
        "error": row.error,
        "unsupported": row.unsupported,
        "evaluation": row.evaluation.name if row.evaluation else None,
        "evaluation_digest": row.evaluation.digest if row.evaluation else None,
        "started_at": row.started_at,
        "key": row.key,
    }
