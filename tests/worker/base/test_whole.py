"""A base that is not whole, or not what it says, is refused by the names of its tensors; strays are no part of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import refusal, run
from tests.worker.small_models import write_model

Weights = dict[str, Any]


def rewrite(model: Path, change: Callable[[Weights], Weights]) -> None:
    """The model's one file of weights, changed."""
    from safetensors.torch import load_file, save_file

    weights = change(load_file(model / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, model / "model.safetensors")


def configure(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def model(model: Path) -> Path:
    """The tests' small Llama with a head of its own."""
    import torch

    configure(model, tie_word_embeddings=False)
    rewrite(model, lambda weights: {**weights, "lm_head.weight": torch.flip(weights["model.embed_tokens.weight"], [0])})
    return model


def without(*words: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: t for name, t in weights.items() if not any(word in name for word in words)}


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("lm_head"), ["1 tensor of the LlamaForCausalLM", "is not in its files: lm_head.weight"]),
        (without("embed_tokens"), ["model.embed_tokens.weight"]),
        (without("layers.1.post_attention_layernorm"), ["model.layers.1.post_attention_layernorm.weight"]),
        (without("layers.1."), ["9 tensors", "model.layers.1.input_layernorm.weight, "]),
        (prefixed("language_model."), ["It holds language_model.lm_head.weight", "a wrapper's names"]),
        (prefixed("base_model.model."), ["It holds base_model.model.lm_head.weight"]),
    ],
)
def test_what_is_missing_or_misnamed_is_not_filled_with_random_numbers(
    model: Path, tmp_path: Path, change: Callable[[Weights], Weights], said: list[str]
) -> None:
    rewrite(model, change)
    answer = refusal({"path": str(model)}, tmp_path / "o")
    assert all(word in answer for word in said), answer


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "9 tensors that a LlamaForCausalLM has no place for: model.layers.1."),
        ({"num_hidden_layers": 3}, "9 tensors of the LlamaForCausalLM that config.json describes are not in its files"),
        ({"vocab_size": 200}, "2 tensors have another shape than config.json says: lm_head.weight"),
        (
            {"architectures": ["LlamaModel"]},
            "LlamaModel, which is not a causal language model. Give the LlamaForCausalLM",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "not a causal language model. Give the LlamaForCausalLM",
        ),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM, which is not a causal"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "T5ForConditionalGeneration, which is"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "already quantized (compressed-tensors)"),
    ],
)
def test_a_configuration_of_another_model(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    configure(model, **changes)
    assert said in refusal({"path": str(model)}, tmp_path / "o")


def test_names_without_the_model_s_prefix(model: Path, tmp_path: Path) -> None:
    """As embedding models have them, tied, so that nothing is missing to a reader that adds the prefix by itself."""
    configure(model, tie_word_embeddings=True)
    rewrite(model, lambda weights: {n.removeprefix("model."): t for n, t in weights.items() if n != "lm_head.weight"})
    assert "lack the prefix 'model.'" in refusal({"path": str(model)}, tmp_path / "o")


def test_two_sets_of_weights(model: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (model / shard).write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    assert "two sets of weights" in refusal({"path": str(model)}, tmp_path / "o")


def test_an_adapter_is_no_model(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    assert "an adapter of owner/name, no model" in refusal({"path": str(model)}, tmp_path / "o")


def test_weights_that_are_quantized_though_nothing_says_so(model: Path, tmp_path: Path) -> None:
    import torch

    rewrite(model, lambda ws: {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in ws.items()})
    assert "stored as F8_E4M3: the model is already quantized" in refusal({"path": str(model)}, tmp_path / "o")


def test_strays_are_left_out_and_told(model: Path, tmp_path: Path) -> None:
    """Every engine and every method reads the same files, whatever else lies beside them."""
    plain = run({"path": str(model)}, tmp_path / "plain")
    assert plain["path"] == str(model) and plain["warnings"] == []
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"):
        (model / name).write_bytes(b"x")
    (model / "adapter_config.json").write_text("{}")
    made = run({"path": str(model)}, tmp_path / "o")
    assert made["path"] == str(tmp_path / "o") and made["parameters"] == plain["parameters"]
    left = {path.name for path in Path(made["path"]).iterdir()}
    assert left == {path.name for path in model.iterdir()} - {
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
        "pytorch_model.bin",
    }
    (said,) = made["warnings"]
    assert said.startswith("left out, no part of the model: adapter_config.json, adapter_model.safetensors, ")
    assert "name it as the base's `adapter`" in said


def test_a_head_of_its_own_in_a_tied_configuration(model: Path, tmp_path: Path) -> None:
    """The same as the embedding: every reader drops one of them. Another: both are kept, and the copy says so."""
    import torch

    configure(model, tie_word_embeddings=True)
    other = run({"path": str(model)}, tmp_path / "other")
    assert json.loads((Path(other["path"]) / "config.json").read_text())["tie_word_embeddings"] is False
    assert "both are kept" in other["warnings"][0]
    rewrite(model, lambda ws: {**ws, "lm_head.weight": torch.clone(ws["model.embed_tokens.weight"])})
    same = run({"path": str(model)}, tmp_path / "same")
    assert same["path"] == str(model) and same["warnings"] == []
    assert same["parameters"] < other["parameters"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers(model: Path, tmp_path: Path, value: float) -> None:
    def change(weights: Weights) -> Weights:
        weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value
        return weights

    rewrite(model, change)
    assert "down_proj.weight has NaN or infinite weights" in refusal({"path": str(model)}, tmp_path / "o")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "llama4_text"])
def test_an_expert_count_that_is_not_the_files(kind: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "base", kind)
    assert run({"path": str(model)}, tmp_path / "whole")["warnings"] == []
    config = json.loads((model / "config.json").read_text())
    count = next(key for key in ("num_local_experts", "num_experts") if key in config)
    configure(model, **{count: config[count] - 1})
    said = refusal({"path": str(model)}, tmp_path / "o")
    assert "have another shape than config.json says" in said and "experts" in said
