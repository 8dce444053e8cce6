"""The one table of architectures: what the calibration pass, packed files and plans must know of a decoder layer.

Everything else about an architecture is transformers' own code (the pass runs its layer classes), so an entry says
only how its layer differs from Llama's. AWQ multiplies the columns of a linear layer by scales and divides whatever
produced its input by the same; that is exact where the producer is a norm's weight, or a linear layer whose
output reaches the input by operations that act on each channel alone (attention mixes tokens, not value
channels; the gate multiplies the up-projection channel by channel). Standard library only: plans read it too.

Rejected: tracing the graph to find the producers. It is longer than the table, and wrong silently where a model
is unusual; the table refuses what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from workbench.errors import UserError, did_you_mean
from workbench.worker import Tensors

LAYERS = "model.layers"
"""Where every architecture below keeps its decoder layers."""

WAY_OUT = "AWQ and GPTQ variants: `engine: gptqmodel` covers more architectures; GGUF: leave `imatrix` out"

EXPERTS = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3", "llama4"}
)
"""Known to have experts: each would need its own Gram matrix, over the tokens routed to it."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Where configurations say how many they have."""

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
    """An entry of the table."""

    linears: Mapping[str, Linear] = field(default_factory=lambda: SEPARATE)
    """Linear layers of a decoder layer by their names inside it."""
    norms_around: bool = False
    """A norm before and one after each half; only the one before produces linear layers' inputs."""
    one_plus: bool = False
    """Norms multiply by 1 + weight."""
    head_norms: bool = False
    """Queries and keys are normalised head by head."""
    qkv_bias: bool = False
    """Biases of q, k and v whatever the configuration says."""
    tied: bool = False
    """Whether the output matrix is the embedding where the configuration does not say."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """`eager` where the fast kernel leaves out part of the model's arithmetic (Gemma 2's capped scores)."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Type of the tensors that stay unquantized; bfloat16 where activations are known to leave float16's range."""


_GEMMA = Family(norms_around=True, one_plus=True, tied=True, dtype="bfloat16")

ARCHITECTURES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(head_norms=True),
    "gemma2": replace(_GEMMA, attention="eager"),
    "gemma3_text": replace(_GEMMA, head_norms=True),
    "phi3": Family(linears=FUSED),
}
"""A configuration's `model_type` -> how such a model's decoder layer differs from Llama's."""


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


@dataclass(frozen=True)
class Producer:
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
    producer: Producer


@dataclass(frozen=True)
class Architecture:
    """One model as the calibration pass sees it."""

    sizes: Sizes
    family: Family
    groups: tuple[Group, ...]

    @property
    def model_type(self) -> str:
        """The configuration's word for it."""
        return self.sizes.model_type

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a decoder layer, in the order of their groups."""
        return tuple(self.family.linears)

    @property
    def gguf(self) -> dict[str, str]:
        """Linear layer -> the name of its tensor in a GGUF block, without `.weight`."""
        return {name: linear.gguf for name, linear in self.family.linears.items()}


@dataclass
class Layer:
    """One decoder layer on its way through the methods.

    `tensors`: name inside the layer -> float32 weight. `grams`: first linear of a group -> G = mean(x x^T),
    float32 [in, in]. Methods must not change either in place. `shared` keeps what several variants need.
    """

    index: int
    tensors: Tensors
    grams: Tensors
    architecture: Architecture
    shared: dict[Any, Any] = field(default_factory=dict)


def on_cpu(layer: Layer) -> Layer:
    """The layer in host memory; what variants shared stays behind."""
    return Layer(
        layer.index,
        {name: tensor.cpu() for name, tensor in layer.tensors.items()},
        {name: gram.cpu() for name, gram in layer.grams.items()},
        layer.architecture,
    )


def describe(config: Mapping[str, Any]) -> Architecture:
    """A model by its `config.json`. Raises `UserError` for an architecture that the table does not have."""
    kind = str(config.get("model_type", "?"))
    if kind in EXPERTS or any(config.get(key) for key in EXPERT_COUNTS):
        raise UserError(f"model_type '{kind}': the calibration pass takes no experts yet. {WAY_OUT}.")
    if kind not in ARCHITECTURES:
        text = config.get("text_config")
        if isinstance(text, dict):
            raise UserError(
                f"model_type '{kind}' is a text model with other senses, and only text models are calibrated. Save its "
                f"text part ({text.get('model_type', 'its language model')}) by itself with transformers and give that "
                f"as the base. Or: {WAY_OUT[0].lower()}{WAY_OUT[1:]}."
            )
        raise UserError(
            f"model_type '{kind}' is not in the calibration pass's table: {did_you_mean(kind, ARCHITECTURES)} "
            f"{WAY_OUT}."
        )
    family, sizes = ARCHITECTURES[kind], sizes_of(config)
    axes, reads_hidden = sizes.axes, [name for name, linear in family.linears.items() if linear.columns == "hidden"]
    attention = tuple(name for name in reads_hidden if name.startswith("self_attn."))
    mlp = tuple(name for name in reads_hidden if name.startswith("mlp."))
    # Of a fused matrix the last rows are the values, or the up-projection.
    value_rows = (axes["qkv"] - axes["keys"], axes["qkv"]) if len(attention) == 1 else None
    up_rows = (axes["inner"], axes["gate_up"]) if len(mlp) == 1 else None
    mlp_norm = "pre_feedforward_layernorm" if family.norms_around else "post_attention_layernorm"
    repeats = sizes.heads // sizes.kv_heads
    return Architecture(
        sizes,
        family,
        (
            Group(attention, Producer("input_layernorm", "norm", one_plus=family.one_plus)),
            Group(
                ("self_attn.o_proj",),
                Producer(attention[-1], "linear", rows=value_rows, repeats=repeats, head_dim=sizes.head_dim),
            ),
            Group(mlp, Producer(mlp_norm, "norm", one_plus=family.one_plus)),
            Group(("mlp.down_proj",), Producer(mlp[-1], "linear", rows=up_rows)),
        ),
    )
