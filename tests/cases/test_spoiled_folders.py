"""Folders that are not one whole, unquantized causal language model: refused by name, or read as the model in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import configure, llama, write_random
from tests.worker.base.bases import refusal, run

Change = Callable[[Path], None]
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Treat it as read-only."""
    return write_random(tmp_path_factory.mktemp("whole") / "base", llama())


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


def config(**changes: Any) -> Change:
    return lambda folder: configure(folder / "config.json", **changes)


def weights(change: Callable[[Tensors], Tensors]) -> Change:
    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = change(load_file(folder / "model.safetensors"))
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")

    return changed


def prefixed(prefix: str) -> Change:
    return weights(lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})


def without(*parts: str) -> Change:
    return weights(lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)})


def both(*changes: Change) -> Change:
    def all_of(folder: Path) -> None:
        for change in changes:
            change(folder)

    return all_of


def as_float8(tensors: Tensors) -> Tensors:
    import torch

    return {name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


def nested_quantized(folder: Path) -> None:
    """A multimodal wrapper's configuration whose text part is quantized."""
    text = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    wrapper = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    (folder / "config.json").write_text(json.dumps({**wrapper, "vision_config": {"model_type": "clip_vision_model"}}))


def null_quantization(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": None}
    (folder / "config.json").write_text(json.dumps(content))


def adapter(folder: Path) -> None:
    """A LoRA beside whatever there is."""
    import torch
    from safetensors.torch import save_file

    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name", "r": 8}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(8, 128)}, folder / "adapter_model.safetensors")


def alone(folder: Path) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink()


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


def unindexed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")


REFUSED: dict[str, tuple[Change, str]] = {
    "fp8 by config": (config(quantization_config={"quant_method": "fp8"}), "already quantized (fp8)"),
    "compressed-tensors": (
        config(quantization_config={"quant_method": "compressed-tensors"}),
        "already quantized (compressed-tensors)",
    ),
    "compression_config": (config(compression_config={"quant_method": "x"}), "already quantized (x)"),
    "nested quantization_config": (nested_quantized, "already quantized (fp8)"),
    "fp8 weights, no config": (weights(as_float8), "lm_head.weight is stored as F8_E4M3"),
    "adapter": (both(adapter, alone), "is an adapter of owner/name, no model"),
    "only pickles": (both(pickled, lambda f: (f / "model.safetensors").unlink()), "holds only pickled weights"),
    "shards without an index": (unindexed, "has 2 *.safetensors but no model.safetensors.index.json"),
    "prefix language_model.": (prefixed("language_model."), "It holds language_model.lm_head.weight"),
    "prefix base_model.model.": (prefixed("base_model.model."), "It holds base_model.model.lm_head.weight"),
    "an embedding model's names": (
        weights(lambda ts: {n.removeprefix("model."): t for n, t in ts.items() if n != "lm_head.weight"}),
        "not in its files: lm_head.weight",
    ),
    "a norm missing": (without("1.post_attention_layernorm"), "model.layers.1.post_attention_layernorm.weight"),
    "a layer missing": (without("layers.1."), "9 tensors of the LlamaForCausalLM that config.json describes"),
    "embedding missing": (without("embed_tokens"), "not in its files: model.embed_tokens.weight"),
    "no head": (both(config(architectures=["LlamaModel"]), without("lm_head")), "LlamaModel, which is not a causal"),
    "fewer layers": (config(num_hidden_layers=1), "hold 9 tensors that a LlamaForCausalLM has no place for"),
    "more layers": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight"),
    "smaller vocabulary": (config(vocab_size=700), "lm_head.weight has [768, 128], not [700, 128]"),
    "larger vocabulary": (config(vocab_size=1024), "lm_head.weight has [768, 128], not [1024, 128]"),
    "no architectures": (config(architectures=None), "names no `architectures`"),
    "an encoder": (config(architectures=["BertForMaskedLM"], model_type="bert"), "BertForMaskedLM, which is not a"),
    "T5": (config(architectures=["T5ForConditionalGeneration"], model_type="t5"), "T5ForConditionalGeneration, which"),
}
READ: dict[str, tuple[Change, list[str]]] = {
    "quantization_config null": (
        null_quantization,
        [],
    ),
    "an adapter beside the model": (adapter, ["left out, no part of the model: adapter_config.json, adapter_model."]),
    "pickles beside the model": (pickled, ["left out, no part of the model: pytorch_model.bin"]),
    "no max_position_embeddings": (config(max_position_embeddings=None), []),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_spoiled_folder_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    change, said = REFUSED[name]
    change(base)
    answer = refusal({"path": str(base)}, tmp_path / "out")
    assert said in answer and str(base) in answer


@pytest.mark.parametrize("name", READ)
def test_what_is_no_part_of_the_model_changes_nothing(name: str, base: Path, tmp_path: Path) -> None:
    change, said = READ[name]
    plain = run({"path": str(base)}, tmp_path / "plain")
    change(base)
    made = run({"path": str(base)}, tmp_path / "out")
    assert made["parameters"] == plain["parameters"] and len(made["warnings"]) == len(said)
    assert all(found.startswith(word) for found, word in zip(made["warnings"], said, strict=True))


@pytest.mark.slow
def test_a_reward_model_is_no_language_model(case: Bench) -> None:
    """Its head has one row; a random one of the vocabulary's size would be scored in its place."""
    from transformers import LlamaForSequenceClassification

    write_random(case.model, llama(num_labels=1, pad_token_id=2), kind=LlamaForSequenceClassification)
    answer = case("run", case.recipe())
    assert answer.returncode == 2 and not case.rows()
    assert "LlamaForSequenceClassification, which is not a causal language model. Give the Llama" in answer.stderr


def test_two_sets_of_weights_are_not_two_models(base: Path, tmp_path: Path) -> None:
    """A merge's file and the shards of what was there before: transformers reads one, the others the other."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    names, files = sorted(tensors), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: files[place * 2 // len(names)] for place, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] * 1.5 for name in names if where[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert "holds two sets of weights, model.safetensors and the shards" in refusal({"path": str(base)}, tmp_path / "o")
