"""The same function of its tokens with other weights: off every quantization grid, in sizes that blocks divide.

A base that was itself de-quantized sits on the grid of that quantization, and the method that made the grid
would look lossless on it; and a row that 256 or 128 does not divide makes K-quants and groups fall back to other
types. Rescaling channels against each other and padding with zeros mends both and changes no output.

Rejected: loading the model in transformers to rewrite it (needs twice its memory; one tensor at a time needs
one tensor).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.errors import UserError
from workbench.front_matter import fields_of, stated_licence
from workbench.worker import Progress, Tensors
from workbench.worker.architectures import SEPARATE, Sizes, sizes_of
from workbench.worker.base.checkpoint import NOT_WEIGHTS, TOKENIZER_FILES, StoredTensor
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_card, write_json, write_weights

if TYPE_CHECKING:
    from torch import Tensor


class _Part(NamedTuple):
    """A weight of a Llama: what its rows and columns run over (`Sizes.axes`), the factors that its rows are multiplied
    by, and those that its columns are divided by."""

    rows: str
    columns: str | None
    multiply: str | None = None
    divide: str | None = None


# A product of the factors along any path through the layer is one.
_FACTORS = {
    "self_attn.q_proj": (None, "attention_in"),
    "self_attn.k_proj": (None, "attention_in"),
    "self_attn.v_proj": ("value", "attention_in"),
    "self_attn.o_proj": (None, "value_of_head"),
    "mlp.gate_proj": (None, "mlp_in"),
    "mlp.up_proj": ("up", "mlp_in"),
    "mlp.down_proj": (None, "up"),
}
_LAYER = {
    "input_layernorm": _Part("hidden", None, "attention_in"),
    "post_attention_layernorm": _Part("hidden", None, "mlp_in"),
    **{name: _Part(SEPARATE[name].rows, SEPARATE[name].columns, *factors) for name, factors in _FACTORS.items()},
}
# The final norm is not rescaled: what follows it may be the tied embedding, which is also read at the input.
_OUTER = {
    "model.embed_tokens": _Part("vocabulary", "hidden"),
    "model.norm": _Part("hidden", None),
    "lm_head": _Part("vocabulary", "hidden"),
}


def write_equivalent(
    path: Path,
    config: Mapping[str, Any],
    tensors: dict[str, StoredTensor],
    hidden: int,
    seed: int,
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

    old, new = equivalent_sizes(config, hidden)
    shrink = old.hidden / new.hidden

    @functools.lru_cache(maxsize=1)  # tensors come layer by layer
    def factors(layer: int) -> Tensors:
        return equivalent_factors(seed, layer, old)

    def part_of(name: str) -> tuple[_Part, int | None]:
        stem = name.rpartition(".")[0]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        part = _LAYER.get(match[2]) if match else _OUTER.get(stem)
        if part is None:
            raise UserError(f"{path}: an exact equivalent of '{name}' is not known. Drop `equivalent` from the recipe.")
        return part, int(match[1]) if match else None

    def shape_in(name: str, sizes: Sizes) -> tuple[int, ...]:
        part, _ = part_of(name)
        sides = (part.rows, part.columns) if name.endswith("weight") else (part.rows,)
        return tuple(sizes.axes[side] for side in sides if side)

    tied = config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in tensors
    shapes = {
        name: shape_in(name, new)
        for name in sorted(tensors, key=_layer_order)
        if not name.endswith(NOT_WEIGHTS) and not (tied and name == "lm_head.weight")
    }

    def make(name: str) -> Tensor:
        part, layer = part_of(name)
        with safe_open(tensors[name].file, framework="pt") as handle:
            weight = handle.get_tensor(name).to(torch.float64)
        expected = shape_in(name, old)
        if tuple(weight.shape) != expected:
            raise UserError(
                f"{path}: {name} has shape {tuple(weight.shape)}, its config.json means {expected}. The "
                "model is damaged."
            )
        if part.multiply and layer is not None:
            factor = factors(layer)[part.multiply]
            weight = weight * (factor[:, None] if weight.ndim == 2 else factor)
        if part.divide and layer is not None and weight.ndim == 2:
            weight = weight / factors(layer)[part.divide][None, :]
        if name.rpartition(".")[0].endswith("norm"):
            weight = weight * math.sqrt(shrink)
        padded = torch.zeros(shapes[name], dtype=torch.float64)
        padded[tuple(slice(0, n) for n in weight.shape)] = weight
        return padded

    write_weights(out, shapes, "float32", make, progress, "writing the exact equivalent")
    changed = {
        **config,
        **new.in_config(),
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
        f"{old.hidden} padded with zeros to {new.hidden}. Made by the Workbench so that no weight "
        "sits on an older quantization's grid and every block size divides every row.",
    )


def _layer_order(name: str) -> tuple[int, str]:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def equivalent_sizes(config: Mapping[str, Any], hidden: int) -> tuple[Sizes, Sizes]:
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
    old = sizes_of(config)
    heads, kv_heads = (count * hidden / old.hidden for count in (old.heads, old.kv_heads))
    if hidden < old.hidden or heads != int(heads) or kv_heads != int(kv_heads):
        step = old.hidden // math.gcd(old.hidden, old.kv_heads)
        fits = [h for h in range(old.hidden, 8 * old.hidden + 1, step) if h % 256 == 0][:3]
        raise UserError(
            f"equivalent.hidden {hidden} does not fit hidden size {old.hidden}, {old.heads} heads and "
            f"{old.kv_heads} KV heads, which must grow by one ratio."
            f"{' Possible: ' + ', '.join(map(str, fits)) + '.' if fits else ''}"
        )
    inner = -(-old.inner // 256) * 256
    return old, replace(old, hidden=hidden, heads=int(heads), kv_heads=int(kv_heads), inner=inner)


def equivalent_factors(seed: int, layer: int, sizes: Sizes) -> Tensors:
    """One layer's random factors in [0.7, 1.4], float64, a vector for each use named in `_LAYER`."""
    import numpy as np
    import torch

    rng, axes = np.random.default_rng([seed, layer]), sizes.axes
    counts = {"attention_in": axes["hidden"], "mlp_in": axes["hidden"], "value": axes["keys"], "up": axes["inner"]}
    drawn = {use: torch.from_numpy(rng.uniform(0.7, 1.4, n)) for use, n in counts.items()}
    heads = drawn["value"].view(-1, sizes.head_dim)
    drawn["value_of_head"] = heads.repeat_interleave(sizes.heads // sizes.kv_heads, dim=0).flatten()
    return drawn
