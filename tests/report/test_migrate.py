"""Rows that an older workbench stored are read as if this one had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.records import SCHEMA_VERSION, Evaluation, Row, Speed, Task, Workload, to_json
from workbench.report import store
from workbench.report.formats.data import objects
from workbench.report.table import build

OLD_ROWS = Path(__file__).with_name("schema-1.jsonl")
"""Rows as the workbench of schema 1 measured and published them."""


def read_one(folder: Path, row: dict[str, Any]) -> Row:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (found,), warnings = store.read(folder / "rows.jsonl")
    assert warnings == []
    return found


def old_quality(total: float) -> dict[str, Any]:
    return {"windows": [{"count": 4, "nonfinite": 0, "nll_sum": total + i} for i in range(3)], "reference_digest": "r"}


def old_row() -> dict[str, Any]:
    """As the last workbench of schema 1 stored it, with several of everything."""
    sample = {"new_tokens": 3, "first_token_s": [0.5, 0.4], "step_s": [[0.1, 0.1]] * 2, "step_tokens": [[1, 1]] * 2}
    test = {"window": 8, "score": "all", "windows": 3, "scored_tokens": 12, "scored_bytes": 40}
    artifact = {"variant": "base", "method": "base", "format": "gguf", "path": "b.gguf", "digest": "d"}
    return {
        "key": "k",
        "base": "Toy-1M",
        "recipe": "toy",
        "recipe_digest": "r",
        "artifact": artifact | {"disk_bytes": 2_000_000, "parameters": 1_000_000},
        "backend": "llamacpp",
        "workload": {
            "prompt_tokens": 100,
            "new_tokens": 3,
            "batch": 1,
            "repeats": 2,
            "warmup": 1,
            "seed": 0,
            "more_prompt_tokens": [20],
            "more_batch": [4, 8],
            "requests": 2,
        },
        "evaluation": {"name": "prose", "path": "e.json", "digest": "e1"} | test,
        "measurement": {
            "device": "cpu",
            "load_s": 1.5,
            "speeds": [{"prompt_tokens": 100, "batch": 1, "energy_j": [], "turns": [1, 1]} | sample],
            "quality": old_quality(8.0),
            "memory": {"peak_rss": 3},
            "settings": {},
            "warnings": [],
            "served": [
                {
                    "slots": 4,
                    "prompt_tokens": 100,
                    "new_tokens": [3],
                    "seconds": [1.0],
                    "continuous": True,
                    "turns": [1],
                }
            ],
            "conditions": {},
            "qualities": {"code": old_quality(9.0)},
            "tasks": {"mine": {"correct": [1, 0]}},
        },
        "machine": {"name": "desk"},
        "versions": {"toy": "1.0"},
        "started_at": "2026-11-21T10:00:00Z",
        "duration_s": 3.0,
        "options": {},
        "evaluations": {"code": {"name": "code", "path": "c.json", "digest": "e2"} | test},
        "tasks": {
            "mine": {"name": "mine", "path": "m.json", "digest": "t", "items": 2, "longest": 9, "harness": False}
        },
        "warnings": [],
        "error": None,
        "unsupported": None,
        "schema_version": 1,
        "measurement_version": 2,
        "place": 0,
    }


def test_a_row_of_schema_1_with_several_of_everything(tmp_path: Path) -> None:
    row = read_one(tmp_path, old_row())
    assert row.schema_version == SCHEMA_VERSION
    assert row.workload == Workload([100, 20], 3, [1, 4, 8], repeats=2, requests=2)
    assert row.workload.points == [(100, 1), (20, 1), (100, 4), (100, 8)]
    assert row.evaluations == {
        "prose": Evaluation("prose", "e.json", "e1", 8, "all", 3, 12, 40),
        "code": Evaluation("code", "c.json", "e2", 8, "all", 3, 12, 40),
    }
    assert row.tasks == {"mine": Task("mine", "m.json", "t", 2, 9)}
    assert row.measurement is not None
    assert [*row.evaluations] == [*row.measurement.qualities] == ["prose", "code"]
    assert row.measurement.qualities == {"prose": old_quality(8.0), "code": old_quality(9.0)}
    assert row.quality == old_quality(8.0) and row.evaluation is row.evaluations["prose"]
    speed = Speed(100, 3, 1, [0.5, 0.4], [[0.1, 0.1]] * 2, [[1, 1]] * 2, [], rounds=[1, 1])
    assert row.measurement.speeds == [speed] and row.measurement.served[0].rounds == [1]
    # As a row it can be stored, and is then one of today's.
    store.append(tmp_path, "desk", row)
    assert store.read(tmp_path / "desk") == ([row], [])
    (record,) = objects(build([row]))
    assert record["evaluation"] == "prose" and [*record["evaluations"]] == ["code"]


@pytest.mark.parametrize("reason", ["error", "unsupported"])
def test_a_row_of_schema_1_with_nothing_measured(tmp_path: Path, reason: str) -> None:
    """Such as the first ones were: without any of the fields that came later."""
    old = old_row() | {"measurement": None, "evaluation": None, reason: "it broke", "workload": {"prompt_tokens": 7}}
    for name in ("evaluations", "tasks", "place", "options", "warnings"):
        del old[name]
    row = read_one(tmp_path, old)
    assert (row.evaluations, row.evaluation, row.quality, row.measurement) == ({}, None, None, None)
    assert row.workload == Workload([7])


def test_published_rows_lose_nothing() -> None:
    rows, warnings = store.history(OLD_ROWS)
    lines = [json.loads(line) for line in OLD_ROWS.read_text().splitlines()]
    assert warnings == [] and len(rows) == len({(line["key"], line["started_at"]) for line in lines})
    newest = {line["key"]: line for line in lines}
    for row in store.read(OLD_ROWS)[0]:
        old = newest[row.key]
        load = old["workload"]
        assert row.workload.prompt_tokens == [load["prompt_tokens"], *load.get("more_prompt_tokens", [])]
        assert row.workload.batches == [load["batch"], *load.get("more_batch", [])]
        assert (row.evaluation.digest if row.evaluation else None) == (old["evaluation"] or {}).get("digest")
        if row.measurement is not None:
            measured = old["measurement"]
            assert to_json(row.quality) == measured["quality"]
            assert [each.rounds for each in row.measurement.speeds] == [
                each.get("turns", []) for each in measured["speeds"]
            ]
