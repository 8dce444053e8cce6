"""Records survive JSON, digests are stable, and old rows can be read by newer programs."""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
import subprocess
import sys

import pytest

from tests.places import ROOT
from workbench.records import (
    Artifact,
    Evaluation,
    Job,
    Machine,
    Measurement,
    Row,
    Served,
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


def measured(*windows: object) -> dict[str, object]:
    return {"device": "cpu", "qualities": {"e": {"windows": list(windows)}}}


def b64(packed: bytes) -> str:
    return base64.b64encode(packed).decode()


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
    with pytest.raises(ValueError, match="backend"):
        from_json(Row, stored)


NAN, HUGE = float("nan"), 10**30
WINDOW = {"count": 3, "nonfinite": 1, "nll_sum": 6.0}
COMPARED = {"kld_count": 2, "kld_sum": 0.5, "same_top_sum": 2, "dp_square_sum": 0.1}
TWO_OF_FOUR = struct.pack("<4e", 0.1, NAN, 0.4, NAN)


@pytest.mark.parametrize(
    ("kind", "value", "place"),
    [
        (Workload, {"repeats": "3"}, r"\$.repeats"),
        (Workload, {"repeats": True}, r"\$.repeats"),
        (Workload, {"repeats": -1}, r"\$.repeats"),
        (Workload, {"repeats": HUGE}, r"\$.repeats"),
        (Workload, {"prompt_tokens": []}, r"\$.prompt_tokens"),
        (Workload, {"prompt_tokens": [512, 0]}, r"\$.prompt_tokens"),
        (Workload, [], "object"),
        (Machine, {"gpus": [{"name": 7}]}, r"\$.gpus"),
        (Machine, {"copy_bytes_per_s": NAN}, "copy_bytes_per_s"),
        (Machine, {"copy_bytes_per_s": float("inf")}, "copy_bytes_per_s"),
        (Machine, {"name": "../x"}, r"\$.name"),
        (Machine, {"name": "a\nb"}, r"\$.name"),
        (Artifact, to_json(ARTIFACT) | {"variant": "n" * 300}, r"\$.variant"),
        (Artifact, to_json(ARTIFACT) | {"variant": ""}, r"\$.variant"),
        (Artifact, to_json(ARTIFACT) | {"tensor_types": {"a": None}}, r"\$.tensor_types"),
        (Artifact, to_json(ARTIFACT) | {"provenance": {"versions": ["torch"]}}, "provenance.versions is no object"),
        (Speed, to_json(SPEED) | {"first_token_s": [0.1]}, "different numbers of repeats"),
        (Speed, to_json(SPEED) | {"rounds": [1, 2]}, "different numbers of repeats"),
        (Speed, to_json(SPEED) | {"rounds": [2, 0]}, "different numbers of repeats"),
        (Speed, to_json(SPEED) | {"step_tokens": [[2, 2], [2, 2]]}, "a time for each step"),
        (Speed, to_json(SPEED) | {"first_token_s": [0.1, 0.0]}, r"\$.first_token_s"),
        (Served, to_json(Served(1, 8, [4], [0.5], True)) | {"rounds": [2]}, "different numbers of repeats"),
        (Measurement, measured(WINDOW | {"nll_sum": NAN}), "nll_sum|windows"),
        (Measurement, measured(WINDOW | {"nll": [1.0, 2.0, None]}), "contradict"),
        (Measurement, measured(WINDOW | {"nll": [1.0, 2.0, 3.0, 4.0]}), "contradict"),
        (Measurement, measured(WINDOW | {"nll": "no base64"}), "base64"),
        (Measurement, measured(WINDOW | COMPARED, WINDOW), "comparison"),
        (Measurement, measured(WINDOW | {"kld_count": 2}), "comparison"),
        (Measurement, measured(WINDOW | COMPARED | {"kld_count": 4}), "contradict"),
        (Measurement, measured(WINDOW | COMPARED | {"same_top_sum": 3}), "contradict"),
        (Measurement, measured(WINDOW | COMPARED | {"kld": b64(TWO_OF_FOUR[:-2])}), "contradict"),
        (Measurement, measured(WINDOW | COMPARED | {"kld_count": 1, "kld": b64(TWO_OF_FOUR)}), "contradict"),
    ],
)
def test_what_no_record_can_be_is_refused_with_its_place(kind: type, value: object, place: str) -> None:
    with pytest.raises(ValueError, match=place):
        from_json(kind, value)


def test_packed_lists_are_bytes_here_and_base64_in_json() -> None:
    stored = measured(WINDOW | COMPARED | {"kld": b64(TWO_OF_FOUR)})
    read = from_json(Measurement, stored)
    assert read.qualities["e"]["windows"][0]["kld"] == TWO_OF_FOUR
    assert to_json(read)["qualities"] == stored["qualities"]


def test_an_interpreter_without_msgspec_reads_what_it_is_given() -> None:
    program = (
        "import json, sys; sys.modules['msgspec'] = None; from workbench.records import *;"
        "job = from_json(Job, json.load(sys.stdin)); assert job.workload.points and job.artifact.path;"
        "print(json.dumps(to_json(job)))"
    )
    given = json.dumps(to_json(Job("Model", ARTIFACT, "vllm", {}, Workload(), {"topics": EVALUATION})))
    told = subprocess.run([sys.executable, "-c", program], input=given, capture_output=True, text=True, cwd=ROOT)
    assert json.loads(told.stdout) == json.loads(given), told.stderr


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
