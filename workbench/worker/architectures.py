"""What a decoder's `config.json` says of its sizes, and for the plainest decoders of its tensors.

Plans count by it what there is no file of yet, with the standard library alone. The calibration pass asks transformers'
own layers instead (`calibration/discover.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len"),
}
"""A size's usual name -> other names for it (GPT-2's, Bloom's, MPT's, OPT's)."""


class Linear(NamedTuple):
    """A linear layer: its tensor's name in a GGUF block, and which of `Sizes.axes` its rows and columns run over."""

    gguf: str
    rows: str
    columns: str


SEPARATE = {
    "self_attn.q_proj": Linear("attn_q", "queries", "hidden"),
    "self_attn.k_proj": Linear("attn_k", "keys", "hidden"),
    "self_attn.v_proj": Linear("attn_v", "keys", "hidden"),
    "self_attn.o_proj": Linear("attn_output", "hidden", "queries"),
    "mlp.gate_proj": Linear("ffn_gate", "inner", "hidden"),
    "mlp.up_proj": Linear("ffn_up", "inner", "hidden"),
    "mlp.down_proj": Linear("ffn_down", "hidden", "inner"),
}
"""Llama's linear layers: q, k, v apart, gate and up apart."""

FUSED = {
    "self_attn.qkv_proj": Linear("attn_qkv", "qkv", "hidden"),
    "self_attn.o_proj": Linear("attn_output", "hidden", "queries"),
    "mlp.gate_up_proj": Linear("ffn_up", "gate_up", "hidden"),
    "mlp.down_proj": Linear("ffn_down", "hidden", "inner"),
}
"""Phi-3's: one matrix for q, k, v and one for gate and up."""


@dataclass(frozen=True)
class Family:
    """How a model type's decoder layer differs from Llama's, as far as its tensors go."""

    linears: Mapping[str, Linear] = field(default_factory=lambda: SEPARATE)
    """Linear layers of a decoder layer by their names inside it."""
    norms_around: bool = False
    """A norm before and one after each half."""
    head_norms: bool = False
    """Queries and keys are normalised head by head."""
    qkv_bias: bool = False
    """Biases of q, k and v whatever the configuration says."""
    tied: bool = False
    """Whether the output matrix is the embedding where the configuration does not say."""


_GEMMA = Family(norms_around=True, tied=True)

ARCHITECTURES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, head_norms=True),
    "phi3": Family(linears=FUSED),
}
"""A configuration's `model_type` -> its tensors, of models that need not be at hand to be planned for."""


@dataclass(frozen=True)
class Sizes:
    """What a decoder's `config.json` says of its sizes."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    """Channels between the two halves of an MLP."""
    vocab_size: int

    @property
    def axes(self) -> dict[str, int]:
        """Lengths of the axes of weights, by the names that `Linear` has for them."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "queries": queries,
            "keys": keys,
            "qkv": queries + 2 * keys,
            "inner": self.inner,
            "gate_up": 2 * self.inner,
            "vocabulary": self.vocab_size,
        }

    def in_config(self) -> dict[str, int]:
        """The sizes in a configuration's words."""
        return {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab_size,
        }


def stated(config: Mapping[str, Any], name: str) -> Any:
    """A configuration's entry by any of the names that it has; None if it says nothing."""
    return next((config[key] for key in (name, *ALIASES.get(name, ())) if config.get(key) is not None), None)


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The sizes of a configuration; `KeyError`, `TypeError` or `ValueError` where it does not say them."""

    def needed(name: str) -> int:
        value = stated(config, name)
        if value is None:
            raise KeyError(name)
        return int(value)

    hidden, heads = needed("hidden_size"), needed("num_attention_heads")
    return Sizes(
        model_type=str(config.get("model_type", "?")),
        hidden=hidden,
        layers=needed("num_hidden_layers"),
        heads=heads,
        kv_heads=int(stated(config, "num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        inner=int(stated(config, "intermediate_size") or 4 * hidden),
        vocab_size=int(config.get("vocab_size") or 0),
    )
