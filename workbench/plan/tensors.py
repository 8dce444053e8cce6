"""From a config.json or from headers to a shape: tensors under GGUF's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import UserError, did_you_mean, short
from workbench.shape import Described, NamedShape, Shape, Traits
from workbench.worker.architectures import ARCHITECTURES, FUSED, SEPARATE, Sizes, sizes_of, stated

COUNTS = {
    "num_hidden_layers": 1000,
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size", "kv_lora_rank"), 2**24),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "qk_rope_head_dim"), 2**16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 2**16),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 2**40),
}
"""What a plan reads of a configuration, and up to how many it takes for a model."""
DECODER = ("num_hidden_layers", "hidden_size", "num_attention_heads")
"""Of which every model has one at least."""


def shape_of(read: Described, where: str) -> Shape:
    """What `worker/base/headers.py` answered, in the plan's terms. Raises `UserError` for a shape it cannot tell."""
    config = read["config"]
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    for key, most in COUNTS.items():
        count, least = text.get(key), int(key in DECODER)
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int | float) or not least <= count <= most or count % 1:
            said = short(repr(count))
            raise UserError(f"{where}: its config.json has a {key} that no model has: {least} to {most}, not {said}")
    try:
        sizes = sizes_of(text)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its config.json does not say {error}: the plan needs a decoder's sizes") from None
    if not sizes.head_dim:
        raise UserError(f"{where}: its config.json has more attention heads than channels")
    experts = int(text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0)
    if read["tensors"] is None:
        tensors = _tensors_of(text, sizes, where)
    elif read["naming"] == "gguf":
        tensors = [NamedShape(name, tuple(shape)) for name, shape in read["tensors"].items()]
    else:
        tensors = _renamed(read["tensors"], sizes.hidden)
    compressed = text.get("kv_lora_rank")
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return Shape(
        tensors=tuple(tensors),
        traits=Traits(sizes.layers, sizes.heads, sizes.kv_heads, experts, sizes.model_type),
        hidden=sizes.hidden,
        head_dim=sizes.head_dim,
        inner=sizes.inner,
        vocab_size=sizes.vocab_size,
        context_tokens=int(stated(text, "max_position_embeddings") or 0),
        dtype=read["dtype"],
        sliding_window=int(window) if window else None,
        latent=int(compressed) + int(text.get("qk_rope_head_dim") or 0) if compressed else None,
    )


_NAMES = (
    (r"model\.embed_tokens\.", "token_embd."),
    (r"lm_head\.", "output."),
    (r"model\.norm\.", "output_norm."),
    *((rf"\.{re.escape(name)}\.", f".{linear.gguf}.") for name, linear in (SEPARATE | FUSED).items()),
    (r"\.self_attn\.q_norm\.", ".attn_q_norm."),
    (r"\.self_attn\.k_norm\.", ".attn_k_norm."),
    (r"\.(mlp|block_sparse_moe|feed_forward)\.(gate|router(\.layer)?)\.", ".ffn_gate_inp."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.pre_feedforward_layernorm\.", ".ffn_norm."),
)
_EXPERT = re.compile(
    r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
}


_TOGETHER = re.compile(
    r".*\.layers\.(\d+)\.(?:(?:mlp|feed_forward|block_sparse_moe)\.experts\.(?P<a>gate_up|down)_proj"
    r"|block_sparse_moe\.(?P<b>in|out)put_linear\.weight)"
)
"""A layer's experts as gpt-oss, Llama 4 and Granite have them in files."""


def _apart(name: str, shape: Sequence[int], hidden: int) -> dict[str, tuple[int, ...]]:
    """Of a tensor that holds all experts of a layer, what the converter makes; empty of any other."""
    found = _TOGETHER.fullmatch(name)
    if not found or len(shape) != 3:
        return {}
    count, *sides = shape
    if (found["a"] or found["b"]) in ("down", "out"):
        inner = sides[0] if sides[1] == hidden else sides[1]
        return {f"blk.{found[1]}.ffn_down_exps.weight": (count, hidden, inner)}
    inner = (sides[0] if sides[1] == hidden else sides[1]) // 2
    return {f"blk.{found[1]}.ffn_{part}_exps.weight": (count, inner, hidden) for part in ("gate", "up")}


def _renamed(tensors: Mapping[str, Sequence[int]], hidden: int) -> list[NamedShape]:
    """Hugging Face's names in GGUF's; a layer's experts become one tensor, as the converter writes them."""
    gemma = any("pre_feedforward_layernorm" in name for name in tensors)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        apart = _apart(name, shape, hidden)
        if apart:
            found |= apart
            continue
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer = expert[1].rpartition(".")[2]
            whole = f"blk.{layer}.{_EXPERT_NAMES[expert[2]]}.weight"
            found[whole] = (found.get(whole, (0,))[0] + 1, *shape)
            continue
        new = name.replace(".language_model.", ".") if ".language_model." in name else name
        for pattern, word in _NAMES:
            if gemma and "post_attention_layernorm" in new:
                new = new.replace("post_attention_layernorm", "post_attention_norm")
            new = re.sub(pattern, word, new)
        found[re.sub(r"^model\.layers\.(\d+)\.", r"blk.\1.", new)] = tuple(shape)
    return [NamedShape(name, shape) for name, shape in found.items()]


def _tensors_of(config: Mapping[str, Any], sizes: Sizes, where: str) -> list[NamedShape]:
    """The tensors of a dense decoder by its configuration, for the architectures whose layers the table describes."""
    kind, axes = sizes.model_type, sizes.axes
    family = ARCHITECTURES.get(kind)
    if family is None:
        raise UserError(
            f"{where}: the tensors of a '{kind}' do not follow from its config.json here. "
            f"{did_you_mean(kind, ARCHITECTURES)} Give the base as `hub:` or `path:`, whose files say them"
        )
    embedding = (sizes.vocab_size, sizes.hidden)
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": embedding, "output_norm.weight": (sizes.hidden,)}
    if not config.get("tie_word_embeddings", family.tied):
        found["output.weight"] = embedding
    norms = ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if family.norms_around else ()))
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (sizes.hidden,) for name in norms}
    if family.head_norms:
        layer |= {"attn_q_norm.weight": (sizes.head_dim,), "attn_k_norm.weight": (sizes.head_dim,)}
    for linear in family.linears.values():
        layer[f"{linear.gguf}.weight"] = (axes[linear.rows], axes[linear.columns])
        by_default = family.qkv_bias and linear.gguf in ("attn_q", "attn_k", "attn_v")
        if by_default or config.get("attention_bias" if linear.gguf.startswith("attn") else "mlp_bias"):
            layer[f"{linear.gguf}.bias"] = (axes[linear.rows],)
    for index in range(sizes.layers):
        found |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return [NamedShape(name, shape) for name, shape in found.items()]
