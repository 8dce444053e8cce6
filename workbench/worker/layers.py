"""A decoder layer as the calibration pass sees it: which linear layers share an input, and what produces that.

AWQ multiplies the columns of a linear layer by scales and divides whatever produced its input by the same; that is
exact where the producer is a norm's weight, or a linear layer whose output reaches the input by operations that act on
each channel alone (attention mixes tokens, not value channels; the gate multiplies the up-projection channel by
channel). Nothing of this is written down for an architecture: `calibration/discover.py` finds it by running the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from workbench.worker import Tensors

LAYERS = "model.layers"
"""Where the models that the pass takes keep their decoder layers."""

WAY_OUT = "AWQ and GPTQ variants: `engine: gptqmodel` covers more architectures; GGUF: leave `imatrix` out"

FLOAT16 = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
"""Model types whose activations are known to stay in float16's range."""


@dataclass(frozen=True)
class Producer:
    """What produces a linear layer's input, channel by channel."""

    module: str
    kind: Literal["norm", "linear"]
    one_plus: bool = False
    """The norm multiplies by 1 + weight."""
    rows: tuple[int, int] | None = None
    """The rows of a linear layer that produce the input, in each of `blocks` equal runs of its rows; all if None."""
    blocks: int = 1
    repeats: int = 1
    """How many heads of the input share a producing head: query heads a value head, or all heads one norm."""
    head_dim: int = 1


@dataclass(frozen=True)
class Group:
    """Linear layers that share an input, and so a Gram matrix. Names are relative to the decoder layer."""

    linears: tuple[str, ...]
    producer: Producer | None
    """None: nothing whose scaling undoes that of the columns; such a group is quantized as it is."""
    routed: str = ""
    """Of an expert: the module that all experts are in. Its input is that of the tokens that are sent to it."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a base's files that a layer has in parts, or by another name. Names are relative to the layer."""

    names: tuple[str, ...]
    """In files; the first that is there."""
    parts: tuple[str, ...]
    """What it holds, with `{}` for an expert's number where its first axis is of experts: two share its rows."""
    transposed: bool = False
    """A matrix is [in, out]."""
    interleaved: bool = False
    """Rows of two parts in turn, not in two halves."""

    def part(self, tensor: Any, place: int) -> Any:
        """One of the parts, of one expert's tensor."""
        tensor = tensor.t() if self.transposed else tensor
        if len(self.parts) == 1:
            return tensor
        return tensor[place::2] if self.interleaved else tensor.chunk(2)[place]


@dataclass(frozen=True)
class Structure:
    """A decoder layer's groups, in the order in which they run."""

    groups: tuple[Group, ...]
    kept: tuple[str, ...] = ()
    """Linear layers in no group, which stay as they are: gates of one channel, what does not run once over tokens."""
    scores: tuple[str, str] | None = None
    """The linear layers of queries and keys, where only the product of their outputs counts."""
    stored: tuple[Stored, ...] = ()
    """What files hold otherwise than the layer has it."""

    @property
    def experts(self) -> dict[str, list[Group]]:
        """The groups of experts by the module that they are in, an expert after another."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            if group.routed:
                found.setdefault(group.routed, []).append(group)
        return found

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers, in the order of their groups."""
        return tuple(name for group in self.groups for name in group.linears)


def parts_of(structure: Structure, tensors: Tensors) -> list[Structure]:
    """A layer's structure in parts whose Gram matrices have no more numbers than the layer has weights, so that many
    experts need no more memory than a layer does; one part, where no experts are. The first has what is no expert's."""
    limit = sum(tensor.numel() for tensor in tensors.values())
    parts = [[group for group in structure.groups if not group.routed]]
    filled = 0
    for groups in structure.experts.values():
        # What feeds an expert's way out is rescaled with it.
        for gate, down in zip(groups[::2], groups[1::2], strict=True):
            needed = sum(tensors[f"{group.linears[0]}.weight"].shape[1] ** 2 for group in (gate, down))
            if filled + needed > limit:
                parts.append([])
                filled = 0
            parts[-1] += [gate, down]
            filled += needed
    first, *others = (replace(structure, groups=tuple(groups)) for groups in parts)
    return [first, *(replace(part, scores=None) for part in others)]


@dataclass(frozen=True)
class Outputs:
    """What the outputs of a layer's linear layers do to what the model says (`calibration/outputs.py`), by linear
    layer, float32."""

    inputs: Tensors
    """Mean(x x^T) of its inputs, half of it with each token by how much the model minds a change of the output there:
    [in, in]."""
    gradients: Tensors
    """Mean(g g^T) of the gradients by its outputs, in runs of outputs: [runs, length, length]."""

    def on_cpu(self) -> Outputs:
        """The same in host memory."""
        return Outputs(*({name: one.cpu() for name, one in each.items()} for each in (self.inputs, self.gradients)))


@dataclass
class Layer:
    """One decoder layer on its way through the methods.

    `tensors`: name inside the layer -> float32 weight. `grams`: first linear of a group -> G = mean(x x^T),
    float32 [in, in]. Methods must not change either in place. `shared` keeps what several variants need.
    """

    index: int
    tensors: Tensors
    grams: Tensors
    structure: Structure
    shared: dict[Any, Any] = field(default_factory=dict)
    outputs: Outputs | None = None
    """For variants whose `objective` is the output; None for the others."""


def on_cpu(layer: Layer) -> Layer:
    """The layer in host memory; what variants shared stays behind."""
    return Layer(
        layer.index,
        {name: tensor.cpu() for name, tensor in layer.tensors.items()},
        {name: gram.cpu() for name, gram in layer.grams.items()},
        layer.structure,
        outputs=layer.outputs and layer.outputs.on_cpu(),
    )


def kept_dtype(config: Mapping[str, Any]) -> str:
    """Type of the tensors that stay unquantized: float16 where activations are known to stay in its range."""
    return "float16" if config.get("model_type") in FLOAT16 else "bfloat16"


def scale_columns(tensors: Tensors, group: Group, scales: Any) -> None:
    """Multiply the columns of a group's linear layers by the scales [in]; replaces entries of `tensors`."""
    for name in group.linears:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * scales


def fold(tensors: Tensors, group: Group, scales: Any) -> None:
    """Multiply the group's columns by the scales and divide its producer by them; replaces entries of `tensors`."""
    scale_columns(tensors, group, scales)
    producer = group.producer
    assert producer is not None
    key, bias = f"{producer.module}.weight", f"{producer.module}.bias"
    if producer.kind == "norm":
        divisor = scales[: producer.head_dim] if producer.repeats > 1 else scales
        tensors[key] = (1 + tensors[key]) / divisor - 1 if producer.one_plus else tensors[key] / divisor
    else:
        divisor = producing_rows(producer, scales, tensors[key].shape[0])
        tensors[key] = tensors[key] / divisor[:, None]
    if bias in tensors:
        tensors[bias] = tensors[bias] / divisor


def producing_rows(producer: Producer, scales: Any, rows: int) -> Any:
    """What each row of a producing linear layer is divided by: [rows]."""
    import torch

    per_row = scales.view(-1, producer.repeats, producer.head_dim)[:, 0].reshape(-1) if producer.repeats > 1 else scales
    if producer.rows is None:
        return per_row
    divisor = torch.ones(producer.blocks, rows // producer.blocks, dtype=scales.dtype, device=scales.device)
    divisor[:, slice(*producer.rows)] = per_row.view(producer.blocks, -1)
    return divisor.view(-1)


def made_by(producer: Producer, values: Any) -> Any:
    """Of each input channel, the value of the row or entry that produces it: [rows] -> [in]."""
    if producer.rows is not None:
        values = values.view(producer.blocks, -1)[:, slice(*producer.rows)]
    heads = values.reshape(-1, 1, producer.head_dim)
    return heads.expand(-1, producer.repeats, -1).reshape(-1)
