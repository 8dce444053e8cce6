"""AWQ's and GPTQ's layouts read back, independently of `kernels/`: what packed tensors are held against."""

from __future__ import annotations

import math
from typing import Any

import pytest

from workbench.worker.methods.awq import NIBBLES

torch = pytest.importorskip("torch")


def unpack_awq(packed: Any) -> Any:
    """The inverse of `awq.pack`: int32 [n, words] -> uint8 [n, words x 8]."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for nibble, column in enumerate(NIBBLES):
        codes[:, :, column] = ((packed >> (4 * nibble)) & 15).to(torch.uint8)
    return codes.reshape(packed.shape[0], -1)


def dequantize_awq(tensors: dict[str, Any]) -> Any:
    """A stored linear layer's weight, float32 [out, in], from its `qweight`, `qzeros`, `scales`."""
    codes, zeros = unpack_awq(tensors["qweight"]).to(torch.float32), unpack_awq(tensors["qzeros"]).to(torch.float32)
    size = codes.shape[0] // zeros.shape[0]
    scales = tensors["scales"].to(torch.float32)
    wide = codes.view(-1, size, codes.shape[1])
    return ((wide - zeros[:, None]) * scales[:, None]).reshape(codes.shape).t().contiguous()


def unpack_gptq(packed: Any, bits: int) -> Any:
    """The inverse of `gptq.pack`: int32 [words, m] -> uint8 [words x 32 / bits, m]."""
    common = math.gcd(bits, 32)
    values, words = 32 // common, bits // common
    table = packed.reshape(-1, words, packed.shape[1]).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(table.shape[0], values, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = table[:, word] >> shift
        if shift + bits > 32:
            value |= table[:, word + 1] << (32 - shift)
        codes[:, i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(-1, packed.shape[1])


def dequantize_gptq(tensors: dict[str, Any], bits: int) -> Any:
    """A stored linear layer's weight, float32 [out, in], from its `qweight`, `qzeros`, `scales`, `g_idx`."""
    codes = unpack_gptq(tensors["qweight"], bits).to(torch.float32)
    zeros = ((unpack_gptq(tensors["qzeros"].t(), bits).to(torch.int64) + 1) & (2**bits - 1)).t().to(torch.float32)
    group = tensors["g_idx"].to(torch.int64)
    return ((codes - zeros[group]) * tensors["scales"].to(torch.float32)[group]).t().contiguous()
