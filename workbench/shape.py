"""The shape of a model as far as memory goes: names and sizes of its tensors, and what follows from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypedDict


@dataclass(frozen=True)
class NamedShape:
    """One tensor by its name in a GGUF file. `shape`: rows first, the length of a row last."""

    name: str
    shape: tuple[int, ...]

    @property
    def weights(self) -> int:
        """How many."""
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The decoder layer it is of, if it is of any."""
        match = re.match(r"blk\.(\d+)\.", self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Traits:
    """What the rules ask of a model beside its tensors' shapes."""

    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    model_type: str = "llama"

    @property
    def sharing(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def is_70b(self) -> bool:
        """llama.cpp knows the 70B models by their 80 layers, and gives their small value matrices more bits."""
        if self.layers != 80:
            return False
        return self.model_type == "qwen2" or (self.model_type == "llama" and self.heads != self.kv_heads)


class Dtype(NamedTuple):
    """A type of numbers: torch's name, and bytes of one number."""

    name: str
    size_bytes: int


FLOATS = {
    "F64": Dtype("float64", 8),
    "F32": Dtype("float32", 4),
    "F16": Dtype("float16", 2),
    "BF16": Dtype("bfloat16", 2),
}
"""Types of unquantized weights by safetensors' and GGUF's names."""
DTYPES = FLOATS | {
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "U16": Dtype("uint16", 2),
    "I8": Dtype("int8", 1),
    "F8_E4M3": Dtype("float8_e4m3fn", 1),
}
"""The same, with those that packed weights and ids are stored in."""
DTYPE_BYTES = {dtype.name: dtype.size_bytes for dtype in DTYPES.values()}
DTYPE_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
SCORE_CHUNK_BYTES = 4 << 20
"""Working memory of one pass of `worker/scoring/reducer.py` on a processor."""


class Described(TypedDict):
    """A base without its weights, as `worker/base/headers.py` reads it."""

    config: Mapping[str, Any]
    """The content of a `config.json`."""
    dtype: str
    """What the prepared base will have."""
    tensors: dict[str, list[int]] | None
    """Name -> shape, rows first; None where only a configuration is known."""
    naming: Literal["hf", "gguf"]
    """Whose names those are."""


@dataclass(frozen=True)
class Shape:
    """A base as far as memory goes."""

    tensors: tuple[NamedShape, ...]
    """Under GGUF's names; tied embeddings once."""
    traits: Traits
    hidden: int
    head_dim: int
    inner: int
    """Channels between the two halves of an MLP."""
    vocab_size: int
    context_tokens: int
    """0 if the configuration does not say."""
    dtype: str
    sliding_window: int | None = None
    latent: int | None = None
    """Values a token and layer, where keys and values are kept compressed (multi-head latent attention)."""

    @cached_property
    def parameters(self) -> int:
        """Weights, tied embeddings once."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def cached_values(self) -> int:
        """Keys and values of one token over all layers."""
        return self.traits.layers * (self.latent or 2 * self.traits.kv_heads * self.head_dim)


@dataclass(frozen=True)
class Stored:
    """What an artifact's files hold of a base of some shape."""

    disk_bytes: int
    """All weight tensors: what `Artifact.disk_bytes` will be."""
    types: dict[str, str] = field(default_factory=dict)
    """Tensor -> type, where the format tells."""
    fallbacks: tuple[str, ...] = ()
    """Tensors that get another type than the mixture means for them."""
    refused: str | None = None
    """Why it cannot be made of this shape."""
    notes: tuple[str, ...] = ()
    """What else a plan says of it."""
    limits: dict[str, str] = field(default_factory=dict)
    """Backend name -> why that engine cannot load it, where its options alone do not tell."""


class Sequences(NamedTuple):
    """What is in memory at once."""

    tokens: int
    """Tokens of each sequence, prompt and new ones."""
    batch: int
    prompt_tokens: int
    window: int = 0
    """Tokens of a window that is scored; 0: nothing is."""

    @property
    def scored_tokens(self) -> int:
        """Positions of a window whose logits are looked at."""
        return -(-self.window // 2)

    @property
    def widest_tokens(self) -> int:
        """Tokens that go through the model together, at the most."""
        return max(self.batch * self.prompt_tokens, self.window)


@dataclass(frozen=True)
class EngineMemory:
    """What an engine needs for a variant, in bytes."""

    weights: float
    kv_cache: float
    workspace: float
    runtime: float
    """Resident memory of its interpreter with its libraries and no model."""
    notes: tuple[str, ...] = ()
    devices: int = 1
    """Over how many devices it is spread."""
