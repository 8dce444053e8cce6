"""What methods share whose variants transformers quantizes as it loads the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from workbench.shape import Shape, Stored

ON_LOAD = ("bitsandbytes", "torchao")
"""Formats that are no files: what is loaded is the base."""


def sizes(shape: Shape, of_matrix: Callable[[int, int], float], group_size: int = 1) -> Stored:
    """The bytes in memory: `of_matrix(rows, columns)` of a decoder layer's matrices, and all else in 16 bits.
    `group_size`: what has to divide the inputs of all of them."""
    total = 0.0
    for tensor in shape.tensors:
        if tensor.layer is None or len(tensor.shape) != 2:
            total += tensor.weights * 2
            continue
        rows, columns = tensor.shape
        if columns % group_size:
            return Stored(0, refused=f"group_size {group_size} does not divide the {columns} inputs of {tensor.name}")
        total += of_matrix(rows, columns)
    return Stored(int(total))


def held_bytes(model: Any) -> int:
    """Bytes of a model's weights as they lie in memory. torchao's tensors say of themselves that they are floats, and
    bitsandbytes keeps its scales beside the parameters."""
    total = sum(part.nbytes for each in (*model.parameters(), *model.buffers()) for part in _parts(each))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        beside = [getattr(getattr(weight, "quant_state", None), "absmax", None)]
        # Of 8 bits they move in the first forward.
        beside += [getattr(each, "SCB", None) for each in (weight, getattr(module, "state", None))]
        total += sum(scales.nbytes for scales in beside if scales is not None)
    return int(total)


def _parts(tensor: Any) -> Iterator[Any]:
    """The plain tensors that a tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))
