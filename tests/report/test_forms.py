"""The container, its types, whether they stayed packed, and the bits in memory: as fields wherever rows are read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.rows import REAL, a_row
from workbench.records import Row
from workbench.report import forms
from workbench.report.formats import FORMATS
from workbench.report.store import read
from workbench.report.table import build
from workbench.report.verdicts.recommend import objects, recommend
from workbench.report.verdicts.wish import Constraints

CARRIED = {"blk.0.ffn_up.weight": "Q4_1", "blk.1.ffn_up.weight": "Q4_1", "output.weight": "F16"}


def of(format: str, types: dict[str, str], kernel: str | None = None, **provenance: Any) -> Row:
    row = a_row("v", memory={"weights": 500_000})
    assert row.measurement is not None
    settings: dict[str, object] = {"kernel": kernel} if kernel else {}
    artifact = replace(row.artifact, format=format, tensor_types=types, provenance=provenance)
    return replace(row, artifact=artifact, measurement=replace(row.measurement, settings=settings))


@pytest.mark.parametrize(
    ("row", "container", "held"),
    [
        (of("gguf", CARRIED, carried={"from": "awq-4bit"}), "gguf Q4_1", "packed"),
        (of("gguf", {"a": "Q4_K", "b": "Q4_K", "c": "Q6_K"}, "none, de-quantized"), "gguf Q4_K+Q6_K", "de-quantized"),
        (of("gguf", {"a": "Q4_0"}, "vllm, Q4_0 as gptq"), "gguf Q4_0", "packed"),
        (of("awq", {"a": "I4-g128", "b": "F16"}, "gptqmodel TorchAtenAwqLinear"), "awq I4-g128", "packed"),
        (of("mlx", {"a": "affine-4", "b": "F16"}), "mlx affine-4", "packed"),
        (of("safetensors", {"*": "F32"}), "safetensors F32", "plain"),
        (of("gguf", {"a": "F32", "b": "BF16"}), "gguf BF16", "plain"),
        (of("bitsandbytes", {"*": "F32"}, loaded=True), "bitsandbytes", "packed"),
        (of("gguf", {}), "gguf", None),
        (replace(of("gguf", CARRIED), measurement=None), "gguf Q4_1", None),
        (of("", {}), None, None),
    ],
)
def test_what_an_engine_had(row: Row, container: str | None, held: str | None) -> None:
    assert (forms.container(row), forms.held(row)) == (container, held)


def test_in_a_few_words() -> None:
    assert forms.words(of("gguf", CARRIED)) == "gguf Q4_1, packed, 4.0 bits a weight"
    assert forms.words(of("", {})) == "4.0 bits a weight"


def test_every_format_of_data_and_a_recommendation_have_it() -> None:
    row = of("gguf", CARRIED, carried={"from": "awq-4bit"})
    table = build([row])
    (record,) = json.loads(FORMATS["json"](table))
    (line,) = csv.DictReader(io.StringIO(FORMATS["csv"](table)))
    (choice,) = [objects(recommend(table, Constraints()))["choice"]]
    assert isinstance(choice, dict)
    for found in (record, line, choice):
        assert (found["container"], found["weights_held"]) == ("gguf Q4_1", "packed")
        assert float(found["engine_bits_per_weight"]) == 4.0
    assert record["carried_from"] == line["carried_from"] == "awq-4bit"


def test_the_stored_rows_tell_their_forms() -> None:
    """Of the full recipe: every pair that was measured, AWQ in llama.cpp and GGUF in vLLM among them."""
    rows = [row for file in REAL for row in read(file.parent)[0] if row.measurement and row.backend != "endpoint"]
    told = {(row.artifact.method, row.backend, forms.container(row), forms.held(row)) for row in rows}
    assert told >= {
        ("awq", "llamacpp", "gguf Q4_1", "packed"),
        ("gptq", "llamacpp", "gguf Q4_0", "packed"),
        ("awq", "vllm", "awq I4-g128", "packed"),
        ("gguf", "vllm", "gguf Q8_0", "de-quantized"),
        ("gguf", "transformers", "gguf Q4_K+Q6_K", "de-quantized"),
    }
    assert {
        held for _, engine, kind, held in told if kind == "compressed-tensors W8A8" and engine == "transformers"
    } <= {"de-quantized"}
    assert all(container and held for *_, container, held in told)
