"""Small random models of every architecture in the calibration pass's table, and what tests do with them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 354,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 256},
    "phi4-mini": {
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
    },
}
"""Of the table; by a name of ours, which is the `model_type` where none is given."""
OTHERS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "gpt_neox": {},
}
"""Not in the table."""


WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}
"""Multiples of 32, as vLLM's kernels on a CPU want them; its attention there begins with heads of 32."""
CARRIED: dict[str, dict[str, Any]] = {
    "llama": {},
    # llama.cpp's converter makes Llamas of Mistrals, and those have no sliding window.
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    # The sixth layer is the first that sees everything, with a rope of its own.
    "gemma3_text": {"query_pre_attn_scalar": 32, "num_hidden_layers": 6},
    "phi3": {},
}
"""Kinds whose checkpoints are carried into other engines, and what they have beside `WIDE`."""


def write_model(folder: Path, kind: str, seed: int = 0, head: float = 0.1, **sizes: Any) -> Path:
    """A random model, float32, with weights large enough for its layers to matter, and biases and norms that are
    not trivial. `kind` is a key of `MODELS` or `OTHERS`, or a `model_type`; `sizes` replaces entries of its
    configuration; `head`: the size of an output matrix of its own."""
    import torch
    import transformers

    more = SIZES | (MODELS | OTHERS).get(kind, {}) | sizes
    config = transformers.AutoConfig.for_model(more.pop("model_type", kind), **more)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() in (2, 3) and "embed" not in name and "conv" not in name:
                parameter.copy_(torch.randn_like(parameter) * (head if name == "lm_head.weight" else 0.1))
    model.save_pretrained(folder)
    return folder


def write_tokens(path: Path, lengths: list[int], vocabulary: int = 354, seed: int = 1) -> Path:
    """Calibration windows of random tokens, as the pass reads them."""
    import torch

    chance = torch.Generator().manual_seed(seed)
    windows = [torch.randint(3, vocabulary, (n,), generator=chance).tolist() for n in lengths]
    path.write_text(json.dumps({"windows": windows}))
    return path


def pass_request(
    base: Path, folder: Path, variants: Mapping[str, tuple[str, Mapping[str, Any]]], **more: Any
) -> dict[str, Any]:
    """What the calibration pass is asked for, on a processor: variants by name, each a method and its options, into
    folders of their names. `more`: entries of the request in the place of these."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in variants:
        (folder / name).mkdir(exist_ok=True)
    return {
        "base": str(base),
        "tokens": str(more.pop("tokens", None) or write_tokens(folder / "tokens.json", [40] * 24)),
        "tokens_digest": "t",
        "variants": [
            {"name": name, "method": method, "options": options, "out": str(folder / name)}
            for name, (method, options) in variants.items()
        ],
        "imatrix_out": str(folder / "imatrix.gguf"),
        "state": str(folder / "state"),
        "device": "cpu",
        "threads": 1,
        "seed": 0,
        "precision": "float32",
    } | more


def write_sentencepiece(folder: Path) -> Path:
    """`tokenizer.model`, a real one of 300 pieces: the one kind that llama.cpp's converter takes for every
    architecture here."""
    import sentencepiece

    made = io.BytesIO()
    words = (f"{a}{b} {b}{a}{a}" for a in "abcdefghij" for b in "klmnopqrst")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words,
        model_writer=made,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        pad_id=-1,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return folder


def dequantized(base: Path, out: Path, method: str, bits: int) -> Any:
    """The base's model with a written checkpoint's weights in place, float32."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from tests.worker.unpacking import dequantize_awq, dequantize_gptq

    tensors = load_file(out / "model.safetensors")
    state = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = {
                s: tensors[f"{stem}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{s}" in tensors
            }
            state[f"{stem}.weight"] = dequantize_awq(parts) if method == "awq" else dequantize_gptq(parts, bits)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    state = experts_together(state, json.loads((base / "config.json").read_text()))
    plain = out.with_name(f"{out.name}-plain")
    plain.mkdir(exist_ok=True)
    shutil.copy2(base / "config.json", plain)
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True
    )
    assert not report["unexpected_keys"] and set(report["missing_keys"]) <= {"lm_head.weight"}
    return model.eval()


def experts_together(state: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Single experts as gpt-oss, Llama 4 and Granite keep them in files, in tensors of all of a layer's."""
    import torch

    kind, count = config["model_type"], config.get("num_local_experts", 0)
    if kind not in ("gpt_oss", "llama4_text", "granitemoe"):
        return state
    stems = {name.partition(".experts.")[0] for name in state if ".experts." in name}
    for stem in stems:
        for leaf in ("weight", "bias") if kind == "gpt_oss" else ("weight",):
            gate, up, down = (
                torch.stack([state.pop(f"{stem}.experts.{n}.{word}.{leaf}") for n in range(count)])
                for word in ("gate_proj", "up_proj", "down_proj")
            )
            pair = torch.stack([gate, up], 2).flatten(1, 2) if kind == "gpt_oss" else torch.cat([gate, up], 1)
            if kind == "granitemoe":
                state |= {f"{stem}.input_linear.weight": pair, f"{stem}.output_linear.weight": down}
                continue
            turned = [tensor.transpose(1, 2) if leaf == "weight" else tensor for tensor in (pair, down)]
            end = "" if leaf == "weight" else "_bias"
            for word, tensor in zip(("gate_up_proj", "down_proj"), turned, strict=True):
                state[f"{stem}.experts.{word}{end}"] = tensor.contiguous()
    return state


def relative(found: Any, expected: Any) -> float:
    """Relative root mean square difference of logits, each position's mean taken out (softmax does not see it)."""
    expected = expected - expected.mean(-1, keepdim=True)
    found = found - found.mean(-1, keepdim=True)
    return float((found - expected).norm() / expected.norm())
