"""The same function of its tokens with other weights: off every quantization grid, in sizes that blocks divide.

A base that was itself de-quantized sits on the grid of that quantization, and the method that made the grid
would look lossless on it; and a row that 256 or 128 does not divide makes K-quants and groups fall back to other
types. Rescaling channels against each other and padding with zeros mends both and changes no output.

Rejected: loading the model in transformers to rewrite it (needs twice its memory; one tensor at a time needs
one tensor).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.front_matter import fields_of, stated_licence
from workbench.worker import Progress
from workbench.worker.base.checkpoint import NOT_WEIGHTS, TOKENIZER_FILES, StoredTensor
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_card, write_json, write_weights

# For each weight of a Llama layer: what its rows and columns run over, the factors that its rows are multiplied
# by, and those that its columns are divided by. A product of the two along any path through the layer is one.
_LAYER = {
    "input_layernorm": ("hidden", None, "attention_in", None),
    "self_attn.q_proj": ("heads", "hidden", None, "attention_in"),
    "self_attn.k_proj": ("kv_heads", "hidden", None, "attention_in"),
    "self_attn.v_proj": ("kv_heads", "hidden", "value", "attention_in"),
    "self_attn.o_proj": ("hidden", "heads", None, "value_of_head"),
    "post_attention_layernorm": ("hidden", None, "mlp_in", None),
    "mlp.gate_proj": ("mlp", "hidden", None, "mlp_in"),
    "mlp.up_proj": ("mlp", "hidden", "up", "mlp_in"),
    "mlp.down_proj": ("hidden", "mlp", None, "up"),
}
# The final norm is not rescaled: what follows it may be the tied embedding, which is also read at the input.
_OUTER = {
    "model.embed_tokens": ("vocab", "hidden", None, None),
    "model.norm": ("hidden", None, None, None),
    "lm_head": ("vocab", "hidden", None, None),
}


def write_equivalent(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, StoredTensor],
    equivalent: dict[str, Any],
    out: Path,
    progress: Progress,
) -> None:
    """Write a Llama model that computes the same function with other weights and wider, zero-padded sizes.

    1. Every channel of a layer's two RMSNorms is multiplied by a random factor in [0.7, 1.4] and the columns of
       the linear layers that read it are divided by it; the rows of v_proj against the columns of o_proj
       (each KV head's factors repeated for the query heads that share it) and those of up_proj against
       down_proj likewise: attention mixes positions but not channels, and SwiGLU is linear in `up`.
    2. Hidden size, heads and KV heads grow by one ratio, new entries zero; the MLP grows to a multiple of 256 if
       it is not one. A mean of squares over n' > n channels of which n are alive is n/n' of the old one,
       so RMSNorm's weight is multiplied by sqrt(n/n') and its epsilon by n/n'.

    All in float64, stored as float32.
    """
    import torch
    from safetensors import safe_open

    old, new = equivalent_sizes(config, int(equivalent["hidden"]))
    seed, shrink = int(equivalent["seed"]), old["hidden"] / new["hidden"]
    group = old["heads"] // old["kv_heads"]
    head_dim = old["head_dim"]

    def width(sizes: dict[str, int], axis: str) -> int:
        return sizes[axis] * head_dim if axis in ("heads", "kv_heads") else sizes[axis]

    layer_factors: dict[int, dict[str, Any]] = {}

    def factors(layer: int) -> dict[str, Any]:
        if layer not in layer_factors:
            layer_factors.clear()  # tensors come layer by layer
            layer_factors[layer] = equivalent_factors(seed, layer, old, group, head_dim)
        return layer_factors[layer]

    def row_of(name: str) -> tuple[str, str | None, str | None, str | None, int | None, str]:
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if match and match[2] in _LAYER:
            return (*_LAYER[match[2]], int(match[1]), kind)
        if stem in _OUTER:
            return (*_OUTER[stem], None, kind)
        raise UserError(f"{path}: an exact equivalent of '{name}' is not known. Drop `equivalent` from the recipe.")

    shapes: dict[str, tuple[int, ...]] = {}
    tied = config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in tensors
    for name in sorted(tensors, key=_layer_order):
        if name.endswith(NOT_WEIGHTS) or (tied and name == "lm_head.weight"):
            continue
        rows, columns, *_, kind = row_of(name)
        shape = (width(new, rows), width(new, columns)) if columns and kind == "weight" else (width(new, rows),)
        shapes[name] = shape

    def make(name: str) -> Any:
        rows, columns, multiply, divide, layer, kind = row_of(name)
        with safe_open(tensors[name].file, framework="pt") as handle:
            weight = handle.get_tensor(name).to(torch.float64)
        expected = (width(old, rows), width(old, columns)) if columns and kind == "weight" else (width(old, rows),)
        if tuple(weight.shape) != expected:
            raise UserError(
                f"{path}: {name} has shape {tuple(weight.shape)}, its config.json means {expected}. The "
                "model is damaged."
            )
        if multiply and layer is not None:
            factor = factors(layer)[multiply]
            weight = weight * (factor[:, None] if weight.ndim == 2 else factor)
        if divide and layer is not None and weight.ndim == 2:
            weight = weight / factors(layer)[divide][None, :]
        if name.rpartition(".")[0].endswith("norm"):
            weight = weight * math.sqrt(shrink)
        padded = torch.zeros(shapes[name], dtype=torch.float64)
        padded[tuple(slice(0, n) for n in weight.shape)] = weight
        return padded

    write_weights(out, shapes, "float32", make, progress, "writing the exact equivalent")
    changed = {
        **config,
        "hidden_size": new["hidden"],
        "num_attention_heads": new["heads"],
        "num_key_value_heads": new["kv_heads"],
        "head_dim": head_dim,
        "intermediate_size": new["mlp"],
        "rms_norm_eps": config["rms_norm_eps"] * shrink,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": "float32",
    }
    changed.pop("torch_dtype", None)
    write_json(out / "config.json", for_both_readers(changed))
    copy_side_files(path, out, ("generation_config.json", *TOKENIZER_FILES))
    card = path / "README.md"
    write_card(
        out,
        str(fields_of(card).get("model_name") or path.name),
        stated_licence(card),
        f"The same function as its source (seed {seed}): channels rescaled against each other, hidden size "
        f"{old['hidden']} padded with zeros to {new['hidden']}. Made by the Workbench so that no weight "
        "sits on an older quantization's grid and every block size divides every row.",
    )


def _layer_order(name: str) -> tuple[int, str]:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def equivalent_sizes(config: dict[str, Any], hidden: int) -> tuple[dict[str, int], dict[str, int]]:
    """The model's sizes and those of its equivalent of a given hidden size."""
    architecture = config["architectures"][0]
    if architecture != "LlamaForCausalLM":
        raise UserError(
            f"`equivalent` is known for LlamaForCausalLM only; this base is {architecture}. Drop it from the recipe."
        )
    if config.get("hidden_act", "silu") != "silu" or config.get("pretraining_tp", 1) not in (0, 1):
        raise UserError(
            "`equivalent` needs a plain Llama model (hidden_act silu, pretraining_tp 1). Drop it from the recipe."
        )
    heads = int(config["num_attention_heads"])
    mlp = int(config["intermediate_size"])
    old = {
        "hidden": int(config["hidden_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "mlp": mlp,
        "vocab": int(config["vocab_size"]),
    }
    grown = {axis: old[axis] * hidden / old["hidden"] for axis in ("heads", "kv_heads")}
    if hidden < old["hidden"] or any(n != int(n) for n in grown.values()):
        step = old["hidden"] // math.gcd(old["hidden"], old["kv_heads"])
        fits = [h for h in range(old["hidden"], 8 * old["hidden"] + 1, step) if h % 256 == 0][:3]
        raise UserError(
            f"equivalent.hidden {hidden} does not fit hidden size {old['hidden']}, {heads} heads and "
            f"{old['kv_heads']} KV heads, which must grow by one ratio."
            f"{' Possible: ' + ', '.join(map(str, fits)) + '.' if fits else ''}"
        )
    new = {**old, "hidden": hidden, **{axis: int(n) for axis, n in grown.items()}, "mlp": -(-mlp // 256) * 256}
    return old, new


def equivalent_factors(seed: int, layer: int, sizes: dict[str, int], group: int, head_dim: int) -> dict[str, Any]:
    """One layer's random factors in [0.7, 1.4], float64, a vector for each use named in `_LAYER`."""
    import numpy as np
    import torch

    rng = np.random.default_rng([seed, layer])
    counts = {
        "attention_in": sizes["hidden"],
        "mlp_in": sizes["hidden"],
        "value": sizes["kv_heads"] * head_dim,
        "up": sizes["mlp"],
    }
    drawn = {use: torch.from_numpy(rng.uniform(0.7, 1.4, n)) for use, n in counts.items()}
    drawn["value_of_head"] = drawn["value"].view(-1, head_dim).repeat_interleave(group, dim=0).flatten()
    return drawn
