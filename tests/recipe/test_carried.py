"""`gguf: {from: NAME}`: a variant that is another's weights; what it may be carried from, and what plans say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from workbench.errors import UserError
from workbench.plan import make as plans
from workbench.plan.tensors import shape_of
from workbench.recipe.choices import form_for, limits_of, making_of
from workbench.recipe.json_schema import schema
from workbench.recipe.load import Recipe, parse
from workbench.records import CarriedVariant

TOKENS = {"source": {"text": "words"}}
CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096}


def recipe(*variants: Any, **more: Any) -> Recipe:
    whole = {"base": {"path": "x"}, "variants": [*variants], "calibration": TOKENS}
    return parse({**whole, **more}, Path("r.yaml"))


def test_a_variant_that_is_anothers_weights() -> None:
    made = recipe({"awq": {"group_size": 32}}, {"gguf": {"from": "awq-4bit-g32"}})
    source, carried = made.variants[1:]
    assert carried == CarriedVariant("gguf-awq-4bit-g32", "awq", source.options, "awq-4bit-g32", "gguf")
    for engine in ("transformers", "vllm", "llamacpp"):
        assert form_for(carried, engine) == "gguf"
    assert making_of(carried).stage == "carry" and making_of(carried).file_name == ".gguf"
    alone = recipe({"awq": {"group_size": 32}})
    assert alone.digest != made.digest


def test_its_limits_are_not_the_checkpoints() -> None:
    """vLLM reads no GPTQ of 3 bits, but the GGUF file of it."""
    made = recipe({"gptq": {"bits": 3}, "name": "three"}, {"gguf": {"from": "three"}, "name": "file"})
    assert "vllm" in limits_of(made.variant("three")) and limits_of(made.variant("file")) == {}
    assert [warning for warning in made.warnings if warning.startswith("file")] == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"from": "awq-4bit"}, r"\.from: unknown variant above it 'awq-4bit'\. Did you mean 'awq-4bit-g128'\?"),
        ({"from": 3}, r"\.from: unknown variant above it '3'"),
        ({"from": "gguf-gptq-4bit-g128"}, "unknown variant above it"),
        ({"from": "base"}, "base cannot be carried to gguf: name a variant of awq or gptq or checkpoint, not the base"),
        (
            {"from": "gguf-Q8_0"},
            "gguf-Q8_0 cannot be carried to gguf: name a variant of awq or gptq or checkpoint, not one of gguf",
        ),
        ({"from": "file"}, "file cannot be carried to gguf: it is carried itself, name awq-4bit-g128"),
        ({"from": "small"}, "small cannot be carried to gguf: .*blocks are of 32 weights, and group_size 16"),
        ({"from": "ordered"}, "ordered cannot be carried to gguf: .*leave `desc_act` out"),
        ({"from": "wide"}, "wide cannot be carried to gguf: .*8 bits with zero points"),
        ({"from": "awq-4bit-g128", "type": "Q4_0"}, r"write `\{from: VARIANT\}` and nothing else \(found type\)"),
    ],
)
def test_what_cannot_be_carried_is_one_line_when_the_recipe_is_read(value: Any, said: str) -> None:
    above = [
        {"awq": {}},
        {"gguf": "Q8_0"},
        {"gguf": {"from": "awq-4bit-g128"}, "name": "file"},
        {"gptq": {"group_size": 16}, "name": "small"},
        {"gptq": {"desc_act": True}, "name": "ordered"},
        {"gptq": {"bits": 8, "sym": False}, "name": "wide"},
    ]
    with pytest.raises(UserError, match=rf"^r\.yaml: variants\[6\]\.gguf.*{said}") as problem:
        recipe(*above, {"gguf": value}, {"gptq": {}})
    assert "\n" not in str(problem.value)


def test_a_folder_for_mlx_is_a_variant_too() -> None:
    """And its engine is for recipes that name it: elsewhere than on a Mac it is slow."""
    made = recipe({"gptq": {"bits": 8, "sym": False}, "name": "wide"}, {"mlx": {"from": "wide"}}, backends=["mlx"])
    carried = made.variant("mlx-wide")
    assert isinstance(carried, CarriedVariant) and carried.form == "mlx" and making_of(carried).python == "mlx"
    assert form_for(made.variant("wide"), "mlx") == form_for(carried, "mlx") == "mlx"
    assert form_for(made.variant("base"), "mlx") == "safetensors"
    assert [choice.name for choice in recipe({"awq": {}}).backends if choice.name == "mlx"] == []
    for value in ("wide", None, {"bits": 4}):
        with pytest.raises(UserError, match=r"variants\[1\]\.mlx: write `\{from: VARIANT\}` and nothing else"):
            recipe({"gptq": {}, "name": "wide"}, {"mlx": value})
    with pytest.raises(UserError, match="small cannot be carried to mlx: MLX's smallest groups are of 32 weights"):
        recipe({"gptq": {"group_size": 48}, "name": "small"}, {"mlx": {"from": "small"}})


def test_no_other_method_takes_from() -> None:
    with pytest.raises(UserError, match=r"variants\[1\]\.awq: unknown key 'from'"):
        recipe({"gptq": {}}, {"awq": {"from": "gptq-4bit-g128"}})


def test_editors_know_it() -> None:
    whole = {"base": {"path": "x"}, "variants": [{"gptq": {}}, {"gguf": {"from": "gptq-4bit-g128"}}]}
    jsonschema.validate(whole, schema())
    whole["variants"] = [{"gguf": {"from": "gptq-4bit-g128", "type": "Q4_0"}}]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(whole, schema())


def test_a_plan_has_its_bytes_once_and_its_needs_in_each_engine() -> None:
    shape = shape_of({"config": CONFIG, "dtype": "float16", "tensors": None, "naming": "hf"}, "here")
    variants = [{"gptq": {"group_size": 32}}, {"gguf": {"from": "gptq-4bit-g32"}}]
    more: dict[str, Any] = {"backends": ["transformers", "llamacpp"], "workload": {"prompt_tokens": 8, "new_tokens": 2}}
    made = plans.make(recipe(*variants, **more), shape=shape, cuda=False)
    alone = plans.make(recipe(variants[0], **more), shape=shape, cuda=False)
    needs = {(need.variant, need.backend): need for need in made.needs}
    file = needs["gguf-gptq-4bit-g32", "llamacpp"]
    assert file.unsupported is None and file.need_bytes
    assert needs["gguf-gptq-4bit-g32", "transformers"].disk_bytes == file.disk_bytes
    assert file.disk_bytes == needs["gptq-4bit-g32", "llamacpp"].disk_bytes
    assert made.disk_bytes == alone.disk_bytes, "it is the file that llama.cpp gets of the checkpoint"
