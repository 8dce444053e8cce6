"""GGUF's blocks as GPTQ's layout: the same codes and scales in groups of 32, for engines whose packed kernels take
that and no blocks.

    Q4_0    w = d (q - 8)    4 bits, symmetric
    Q8_0    w = d c          8 bits, symmetric, q = c + 128

The way back of `carry.py`, and exact.
"""

from __future__ import annotations

from typing import Any, Literal

from workbench.worker import Tensors
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import BLOCK

BITS: dict[str, Literal[4, 8]] = {"Q4_0": 4, "Q8_0": 8}
"""llama.cpp's types that are GPTQ's grid -> the bits of a code."""


def repacked(kind: str, rows: Any) -> Tensors:
    """A matrix of blocks, numpy uint8 [out, bytes of a row], as `qweight` int32 [in x bits / 32, out], `qzeros` int32
    [groups, out x bits / 32] and `scales` float16 [groups, out]; zeros as version 1 of the format has them, less one.

    Raises `ValueError` for outputs that do not fill words.
    """
    import numpy as np
    import torch

    bits = BITS[kind]
    table = rows.reshape(len(rows), -1, 2 + BLOCK * bits // 8)
    scales = np.ascontiguousarray(table[:, :, :2]).view(np.float16)[:, :, 0]
    body = table[:, :, 2:]
    codes = np.concatenate([body & 15, body >> 4], 2) if bits == 4 else body ^ 128
    zeros = torch.full((len(rows), scales.shape[1]), 2 ** (bits - 1) - 1, dtype=torch.uint8)
    return {
        "qweight": gptq.pack(torch.from_numpy(codes.reshape(len(rows), -1)).t().contiguous(), bits),
        "qzeros": gptq.pack(zeros, bits).t().contiguous(),
        "scales": torch.from_numpy(scales.copy()).t().contiguous(),
    }
