"""Records survive JSON, digests are stable, and old rows can be read by newer programs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from workbench.records import (
    Artifact,
    Evaluation,
    Job,
    Machine,
    Measurement,
    Row,
    Speed,
    Variant,
    Workload,
    digest,
    from_json,
    to_json,
)

ARTIFACT = Artifact(
    variant="gguf-Q4_0",
    method="gguf",
    format="gguf",
    path="/cache/x.gguf",
    digest="0123",
    disk_bytes=100,
    parameters=160,
    tensor_types={"blk.0.attn_q.weight": "Q4_0"},
    warnings=["w"],
    provenance={"seconds": 1.5},
)
EVALUATION = Evaluation("topics", "/cache/t.json", "4567", 512, "second-half", 20, 5120, 20_000)
SPEED = Speed(32, 8, 2, [0.1, 0.2], [[0.01, 0.02], [0.03]], [[2, 2], [2]])
ROW = Row(
    key="k",
    base="Model",
    recipe="r",
    recipe_digest="d",
    artifact=ARTIFACT,
    backend="llamacpp",
    workload=Workload(),
    evaluations={"topics": EVALUATION},
    measurement=Measurement("cpu", 0.5, [SPEED], {"topics": {"windows": []}}, {"weights": 1}, {}, ["x"]),
    machine=Machine("m"),
    versions={"torch": "2"},
    started_at="2026-01-01T00:00:00Z",
    duration_s=1.0,
)


@pytest.mark.parametrize(
    "record",
    [
        Variant("a", "gguf", {"type": "Q4_0"}),
        ARTIFACT,
        Workload(batches=[4]),
        EVALUATION,
        SPEED,
        Job("Model", ARTIFACT, "vllm", {}, Workload(), {"topics": EVALUATION}),
        Job("Model", ARTIFACT, "vllm", {}, Workload()),
        ROW,
        dataclasses.replace(ROW, measurement=None, evaluations={}, error="no"),
    ],
    ids=lambda record: type(record).__name__,
)
def test_there_and_back_through_json(record: object) -> None:
    assert from_json(type(record), json.loads(json.dumps(to_json(record)))) == record


def test_records_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROW.key = "other"  # type: ignore[misc]


def test_fields_added_later_are_dropped_and_absent_ones_have_their_defaults() -> None:
    stored = to_json(ROW)
    stored["invented_later"] = 1
    stored["artifact"]["invented_later"] = 1
    del stored["warnings"], stored["unsupported"], stored["artifact"]["provenance"]
    read = from_json(Row, stored)
    assert read == dataclasses.replace(ROW, artifact=dataclasses.replace(ARTIFACT, provenance={}))


def test_a_missing_field_without_a_default_is_an_error() -> None:
    stored = to_json(ROW)
    del stored["backend"]
    with pytest.raises(TypeError, match="backend"):
        from_json(Row, stored)


def test_bits_per_weight_by_the_one_convention() -> None:
    assert ARTIFACT.bits_per_weight == 100 * 8 / 160
    assert dataclasses.replace(ARTIFACT, parameters=0).bits_per_weight is None


def test_a_digest_is_of_the_value_not_of_its_form() -> None:
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1})
    assert digest(Variant("a", "b")) == digest({"name": "a", "method": "b", "options": {}})
    assert digest({1: "x"}) == digest({"1": "x"})
    different = [{}, [], None, "", 0, 1, "1", {"a": 1}, {"a": 2}, {"b": 1}, [1, 2], [2, 1], True, "ü", "u"]
    assert len({digest(value) for value in different}) == len(different)
    assert all(len(digest(value)) == 16 and int(digest(value), 16) >= 0 for value in different)


def test_a_digest_is_the_same_in_every_process() -> None:
    """Python's own hashes are not; caches and rows must be found again tomorrow and elsewhere."""
    program = "from workbench.records import digest; print(digest({'b': ['ü', 1.5, None], 'a': {'y': 1, 'x': 2}}))"
    answers = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert answers == {digest({"b": ["ü", 1.5, None], "a": {"y": 1, "x": 2}})}
