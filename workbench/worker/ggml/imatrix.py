"""The importance matrix of llama.cpp: the mean square of every input channel, which is diag(G).

Written as the GGUF file that `llama-imatrix` writes today (sums of squares and token counts a tensor), read back
as the means that `llama-quantize` makes of it, and handed to the quantizer in process as the C array it wants.
The converter permutes the rows of q and k for Llama; importance belongs to columns, which keep their order but for
those that `names.file_columns` tells of.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UserError

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

Means = dict[str, "NDArray[float32]"]
"""GGUF tensor name -> the mean square of each of its inputs, float32."""

SUMS, COUNTS = ".in_sum2", ".counts"


def write(path: str | Path, means: Means, *, tokens: int, windows: int, window: int, dataset: str) -> None:
    """Write an importance matrix that `llama-quantize --imatrix` reads.

    `means`: GGUF tensor name -> float32 [in], or [experts, in], the mean square of each input over `tokens` tokens.
    `dataset` names the calibration; `windows` and `window` (tokens in one) are recorded as chunks.
    """
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", windows)
    writer.add_uint32("imatrix.chunk_size", window)
    for name in sorted(means):
        sums = np.asarray(means[name], dtype=np.float32) * np.float32(tokens)
        rows = sums.reshape(-1, sums.shape[-1])
        writer.add_tensor(name + SUMS, rows)
        writer.add_tensor(name + COUNTS, np.full((len(rows), 1), tokens, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: str | Path) -> Means:
    """GGUF tensor name -> float32 [in], from a GGUF importance matrix (ours or `llama-imatrix`'s).

    Tensors of experts come out with their matrices one after the other, as the quantizer wants them. Raises
    `UserError` if the file is no such matrix.
    """
    import gguf
    import numpy as np

    try:
        reader = gguf.GGUFReader(str(path))
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: not a GGUF importance matrix ({problem}); write one with `llama-imatrix`") from None
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    means: Means = {}
    for name, sums in tensors.items():
        if name.endswith(SUMS):
            counts = tensors.get(name[: -len(SUMS)] + COUNTS)
            if counts is None:
                raise UserError(f"{path}: '{name}' has no counts; the file is damaged, write it again")
            rows = np.array(sums, dtype=np.float32).reshape(counts.size, -1)
            seen = counts.reshape(-1, 1)
            # An expert that saw no token says nothing: all its columns weigh the same.
            means[name[: -len(SUMS)]] = np.where(seen > 0, rows / np.maximum(seen, 1), 1).astype(np.float32).reshape(-1)
    if not means:
        raise UserError(f"{path}: holds no importance matrix; write one with `llama-imatrix`")
    return means


@dataclass(frozen=True)
class QuantizePointer:
    """`pointer` is for `llama_model_quantize_params.imatrix`; keep this object until the quantizer has returned."""

    pointer: Any
    entries: int
    owned: tuple[Any, ...]
    """The memory that the pointer's structures point into."""


def as_quantize_pointer(source: str | Path | Means) -> QuantizePointer:
    """An importance matrix (a file, or `load`'s result) as `llama_model_quantize` takes it.

    llama.cpp wants an array of {name, data, size} that ends with an empty entry.
    """
    import llama_cpp
    import numpy as np

    means = source if isinstance(source, dict) else load(source)
    entry = llama_cpp.llama_model_imatrix_data
    array = (entry * (len(means) + 1))()
    owned: list[Any] = [array]
    for place, (name, values) in zip(array, sorted(means.items()), strict=False):
        data = np.ascontiguousarray(values, dtype=np.float32)
        word = name.encode()
        owned += [data, word]
        place.name, place.size = word, data.size
        place.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    array[len(means)].name, array[len(means)].size = None, 0
    return QuantizePointer(ctypes.cast(array, ctypes.POINTER(entry)), len(means), tuple(owned))
