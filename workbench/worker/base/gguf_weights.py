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


def weights_of(path: Path, read: GgufModel) -> Iterator[tuple[str, Any]]:
    """Name and float32 values of each weight of a file that was `read`, one at a time. `UserError` for experts, which
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
            yield mapped.names[tensor.name], mapped.dense(tensor)
