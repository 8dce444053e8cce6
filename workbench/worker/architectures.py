"""What the calibration pass must know of a decoder layer: who shares an input, who feeds whom.

Everything else about an architecture is transformers' own code (`calibrate.py` runs its layer classes), so an
entry here is a few names. AWQ multiplies the columns of a linear layer by scales and divides whatever
produced its input by the same; that is exact where the producer is a norm's weight, or a linear layer whose
output reaches the input by operations that act on each channel alone (attention mixes tokens, not value
channels; the gate multiplies the up-projection channel by channel). A producer is named by `Feeder`.

Rejected: tracing the graph to find the producers. It is longer than the table, and wrong silently where a model
is unusual; the table refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from workbench.errors import UserError, did_you_mean

LAYERS = "model.layers"
"""Where every architecture below keeps its decoder layers."""

WAY_OUT = "Give the variant `engine: gptqmodel`, which covers more architectures"

EXPERTS = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3", "llama4"}
)
"""Known to have experts: each would need its own Gram matrix, over the tokens routed to it."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations say how many they have."""


@dataclass(frozen=True)
class Feeder:
    """What produces a linear layer's input, channel by channel."""

    module: str
    kind: Literal["norm", "linear"]
    one_plus: bool = False
    """The norm multiplies by 1 + weight."""
    rows: tuple[int, int] | None = None
    """The rows of a fused linear layer that produce the input; all if None."""
    repeats: int = 1
    """Grouped-query attention: how many query heads share one value head."""
    head_dim: int = 1


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input, and so a Gram matrix. Names are relative to the decoder layer."""

    linears: tuple[str, ...]
    feeder: Feeder


@dataclass(frozen=True)
class Architecture:
    """One model family as the calibration pass sees it."""

    model_type: str
    groups: tuple[Group, ...]
    gguf: dict[str, str]
    """Linear layer -> the name of its tensor in a GGUF block, without `.weight`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """`eager` where the fast kernel leaves out part of the model's arithmetic (Gemma 2's capped scores)."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of the tensors that stay unquantized; bfloat16 where activations are known to leave float16's range."""

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer, in table order."""
        return tuple(name for group in self.groups for name in group.linears)


@dataclass
class Layer:
    """One decoder layer on its way through the methods.

    `tensors`: name inside the layer -> float32 weight. `grams`: first linear of a group -> G = mean(x x^T),
    float32 [in, in]. Methods must not change either in place. `shared` keeps what several variants need.
    """

    index: int
    tensors: dict[str, Any]
    grams: dict[str, Any]
    architecture: Architecture
    shared: dict[Any, Any] = field(default_factory=dict)


def away(layer: Layer) -> Layer:
    """The layer in host memory; what variants shared stays behind."""
    return Layer(
        layer.index,
        {name: tensor.cpu() for name, tensor in layer.tensors.items()},
        {name: gram.cpu() for name, gram in layer.grams.items()},
        layer.architecture,
    )


def describe(config: dict[str, Any]) -> Architecture:
    """The table's entry for a model's `config.json`. Raises `UserError` for an architecture it does not have."""
    kind = str(config.get("model_type", "?"))
    if kind in EXPERTS or any(config.get(key) for key in EXPERT_COUNTS):
        raise UserError(f"model_type '{kind}': AWQ and GPTQ of experts are not supported yet. {WAY_OUT}.")
    if kind not in ARCHITECTURES:
        text = config.get("text_config")
        hint = "only text models are calibrated. " if isinstance(text, dict) else ""
        raise UserError(
            f"model_type '{kind}' is not in the calibration pass's table: {hint}{did_you_mean(kind, ARCHITECTURES)} "
            f"{WAY_OUT}."
        )
    return ARCHITECTURES[kind](config)


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads, channels of a head."""
    queries = int(config["num_attention_heads"])
    values = int(config.get("num_key_value_heads") or queries)
    return queries, values, int(config.get("head_dim") or int(config["hidden_size"]) // queries)


def _separate(
    config: dict[str, Any], mlp_norm: str = "post_attention_layernorm", one_plus: bool = False, **more: Any
) -> Architecture:
    """Llama's layer: q, k, v apart, gate and up apart."""
    queries, values, head_dim = _heads(config)
    return Architecture(
        model_type=str(config["model_type"]),
        groups=(
            Group(
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                Feeder("input_layernorm", "norm", one_plus=one_plus),
            ),
            Group(
                ("self_attn.o_proj",),
                Feeder("self_attn.v_proj", "linear", repeats=queries // values, head_dim=head_dim),
            ),
            Group(("mlp.gate_proj", "mlp.up_proj"), Feeder(mlp_norm, "norm", one_plus=one_plus)),
            Group(("mlp.down_proj",), Feeder("mlp.up_proj", "linear")),
        ),
        gguf={
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        **more,
    )


def _fused(config: dict[str, Any]) -> Architecture:
    """Phi-3's layer: one matrix for q, k, v and one for gate and up."""
    queries, values, head_dim = _heads(config)
    first_value, inner = (queries + values) * head_dim, int(config["intermediate_size"])
    return Architecture(
        model_type=str(config["model_type"]),
        groups=(
            Group(("self_attn.qkv_proj",), Feeder("input_layernorm", "norm")),
            Group(
                ("self_attn.o_proj",),
                Feeder(
                    "self_attn.qkv_proj",
                    "linear",
                    rows=(first_value, first_value + values * head_dim),
                    repeats=queries // values,
                    head_dim=head_dim,
                ),
            ),
            Group(("mlp.gate_up_proj",), Feeder("post_attention_layernorm", "norm")),
            Group(("mlp.down_proj",), Feeder("mlp.gate_up_proj", "linear", rows=(inner, 2 * inner))),
        ),
        gguf={
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
    )


def _gemma(config: dict[str, Any], **more: Any) -> Architecture:
    """Gemma's layer: a norm before and after each half; only the one before feeds linear layers."""
    return _separate(config, mlp_norm="pre_feedforward_layernorm", one_plus=True, dtype="bfloat16", **more)


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], Architecture]] = {
    "llama": _separate,
    "mistral": _separate,
    "qwen2": _separate,
    "qwen3": _separate,
    "gemma2": lambda config: _gemma(config, attention="eager"),
    "gemma3_text": _gemma,
    "phi3": _fused,
}
