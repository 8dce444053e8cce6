"""From a config.json or from headers to a shape: tensors under GGUF's names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from workbench.errors import UserError, did_you_mean
from workbench.shape import NamedShape, Shape, Traits


def shape_of(read: dict[str, Any], where: str) -> Shape:
    """What `worker/base/headers.py` answered, in the plan's terms. Raises `UserError` for a shape it cannot tell."""
    config = read["config"]
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    try:
        hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
        heads = int(text["num_attention_heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its config.json does not say {error}: the plan needs a decoder's sizes") from None
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    kind = str(text.get("model_type", "?"))
    experts = int(text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0)
    if read["tensors"] is None:
        tensors = _tensors_of(text, kind, where)
    elif read["naming"] == "gguf":
        tensors = [NamedShape(name, tuple(shape)) for name, shape in read["tensors"].items()]
    else:
        tensors = _renamed(read["tensors"])
    compressed = text.get("kv_lora_rank")
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return Shape(
        tensors=tuple(tensors),
        traits=Traits(layers, heads, kv_heads, experts, kind),
        hidden=hidden,
        head_dim=head_dim,
        inner=int(text.get("intermediate_size") or 4 * hidden),
        vocab_size=int(text.get("vocab_size") or 0),
        context_tokens=int(text.get("max_position_embeddings") or 0),
        dtype=read["dtype"],
        sliding_window=int(window) if window else None,
        latent=int(compressed) + int(text.get("qk_rope_head_dim") or 0) if compressed else None,
    )


_NAMES = (
    (r"model\.embed_tokens\.", "token_embd."),
    (r"lm_head\.", "output."),
    (r"model\.norm\.", "output_norm."),
    (r"\.self_attn\.q_proj\.", ".attn_q."),
    (r"\.self_attn\.k_proj\.", ".attn_k."),
    (r"\.self_attn\.v_proj\.", ".attn_v."),
    (r"\.self_attn\.o_proj\.", ".attn_output."),
    (r"\.self_attn\.qkv_proj\.", ".attn_qkv."),
    (r"\.self_attn\.q_norm\.", ".attn_q_norm."),
    (r"\.self_attn\.k_norm\.", ".attn_k_norm."),
    (r"\.mlp\.gate_proj\.", ".ffn_gate."),
    (r"\.mlp\.up_proj\.", ".ffn_up."),
    (r"\.mlp\.gate_up_proj\.", ".ffn_up."),
    (r"\.mlp\.down_proj\.", ".ffn_down."),
    (r"\.mlp\.gate\.|\.block_sparse_moe\.gate\.", ".ffn_gate_inp."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.pre_feedforward_layernorm\.", ".ffn_norm."),
)
_EXPERT = re.compile(
    r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
}


def _renamed(tensors: dict[str, Sequence[int]]) -> list[NamedShape]:
    """Hugging Face's names in GGUF's; a layer's experts become one tensor, as the converter writes them."""
    gemma = any("pre_feedforward_layernorm" in name for name in tensors)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
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


DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Decoders whose tensors follow from a configuration alone."""


def _tensors_of(config: dict[str, Any], kind: str, where: str) -> list[NamedShape]:
    """The tensors of a dense decoder by its configuration."""
    if kind not in DENSE:
        raise UserError(
            f"{where}: the tensors of a '{kind}' do not follow from its config.json here. {did_you_mean(kind, DENSE)} "
            "Give the base as `hub:` or `path:`, whose files say them"
        )
    hidden, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    inner, vocab_size = int(config["intermediate_size"]), int(config["vocab_size"])
    queries, keys = heads * head_dim, kv_heads * head_dim
    found = {"token_embd.weight": (vocab_size, hidden), "output_norm.weight": (hidden,)}
    # Gemma ties unless its configuration says otherwise.
    if not config.get("tie_word_embeddings", kind.startswith("gemma")):
        found["output.weight"] = (vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if kind == "phi3":
        layer |= {"attn_qkv.weight": (queries + 2 * keys, hidden), "ffn_up.weight": (2 * inner, hidden)}
    else:
        layer |= {
            "attn_q.weight": (queries, hidden),
            "attn_k.weight": (keys, hidden),
            "attn_v.weight": (keys, hidden),
            "ffn_gate.weight": (inner, hidden),
            "ffn_up.weight": (inner, hidden),
        }
    layer |= {"attn_output.weight": (hidden, queries), "ffn_down.weight": (hidden, inner)}
    if kind == "qwen2" or config.get("attention_bias"):
        layer |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if config.get("attention_bias") and kind in ("llama", "qwen3"):
        layer["attn_output.bias"] = (hidden,)
    if config.get("mlp_bias"):
        layer |= {"ffn_gate.bias": (inner,), "ffn_up.bias": (inner,), "ffn_down.bias": (hidden,)}
    if kind in ("qwen3", "gemma3_text"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if kind.startswith("gemma"):
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    for index in range(layers):
        found |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return [NamedShape(name, shape) for name, shape in found.items()]
