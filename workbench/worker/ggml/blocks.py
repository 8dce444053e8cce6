"""What a matrix becomes in each of llama.cpp's types: quantized by its own functions and read back, in host memory.

The functions are those that `llama-quantize` calls a piece of a tensor with, so the errors are those of its files.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from workbench.shape import FLOATS
from workbench.worker.ggml.index import block_maker
from workbench.worker.ggml.mixtures import BLOCKS
from workbench.worker.ggml.quantizer import all_threads, ready


def round_trip(kind: str, rows: Any, importance: Any = None) -> Any:
    """`rows` float32 [n, in], and float32 [in] or None, numpy -> what a file of that type would hold, float32 [n, in].

    Raises `UserError` if llama-cpp-python is missing.
    """
    import numpy as np

    if kind in FLOATS:
        import torch

        return torch.from_numpy(rows).to(getattr(torch, FLOATS[kind].name)).float().numpy()
    quantize = _quantizer()
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    number, rows = GGMLQuantizationType[kind], np.ascontiguousarray(rows, dtype=np.float32)
    weights, size = BLOCKS[kind]
    count, columns = rows.shape
    blocks = np.zeros((count, columns // weights * size), dtype=np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    workers = all_threads()
    step = max(1, -(-count // workers))
    found = np.empty_like(rows)

    def piece(first: int) -> None:
        some = min(step, count - first)
        quantize(int(number), rows.ctypes.data, blocks.ctypes.data, first * columns, some, columns, pointer)
        found[first : first + some] = dequantize(blocks[first : first + some], number)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(piece, range(0, count, step)))
    return found


@lru_cache(maxsize=1)
def _quantizer() -> Any:
    ready()
    return block_maker()
