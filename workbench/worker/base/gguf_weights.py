"""A GGUF file's tensors as transformers' model has them: de-quantized, by its names, in its order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.worker.base.gguf_config import GgufModel, names_in


class Mapped:
    """The `names` of a file's tensors in a model, and transformers' `processor`, which undoes what was rearranged."""

    def __init__(self, path: Path, read: GgufModel, model: Any) -> None:
        self.path = path
        self.names, self.processor = names_in(model, path, read.reader, read.config)

    def dense(self, tensor: Any) -> Any:
        """One of the reader's tensors, float32 in torch."""
        import torch
        from gguf.quants import dequantize

        try:
            weights = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: tensor {tensor.name} is {tensor.tensor_type.name}, which nobody here de-quantizes: "
                "take a file of other types, or run it in llama.cpp"
            ) from None
        done = self.processor.process(
            weights=weights,
            name=tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": {}},
        )
        return torch.from_numpy(done.weights.copy())

    def row_order(self, tensor: Any) -> Any:
        """The order in which transformers wants a tensor's rows, int [rows]; None if it does more to them than move
        them. Asked of row numbers, which the processor rearranges as it does weights."""
        import numpy as np

        rows = tensor.data.shape[0]
        probe = np.arange(2 * rows).reshape(rows, 2)
        try:
            done = self.processor.process(
                weights=probe.copy(), name=tensor.name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
        except (ValueError, KeyError, IndexError):
            return None
        moved = done.weights
        if done.name != tensor.name or moved.shape != probe.shape or not np.array_equal(moved[:, 1], moved[:, 0] + 1):
            return None
        order = moved[:, 0] // 2
        return order if np.array_equal(np.sort(order), np.arange(rows)) and not (moved[:, 0] % 2).any() else None


def tensors_of(path: Path, read: GgufModel) -> Iterator[tuple[Mapped, str, Any]]:
    """Each of the reader's tensors that a model has a place for, with its name there. `UserError` for experts, which
    transformers puts together from several tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read.config)
    mapped = Mapped(path, read, model)
    for tensor in read.reader.tensors:
        if "_exps." in tensor.name:
            raise UserError(f"{path}: tensor {tensor.name} is of experts, which are not read one at a time")
        if tensor.name in mapped.names:
            yield mapped, mapped.names[tensor.name], tensor


def weights_of(path: Path, read: GgufModel) -> Iterator[tuple[str, Any]]:
    """Name and float32 values of each weight of a file that was `read`, one at a time. `UserError` for experts."""
    for mapped, name, tensor in tensors_of(path, read):
        yield name, mapped.dense(tensor)
