"""Q8_0: 32 weights in 34 bytes (8.5 bits a weight), w = d x q.

    bytes 0-1    d    float16
    bytes 2-33   q    int8, one a weight, in order

Read in 16-bit words (34 is no multiple of 4): word j of a block's sixteen holds weights 2j and 2j + 1.
Source of the layout: llama.cpp, ggml-common.h, `block_q8_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 34] -> float32 [n, 32]."""
    scale = data[:, :2].contiguous().view(torch.float16).float()
    return scale * data[:, 2:].view(torch.int8).float()


@jit
def _load(row, s, j, inside):
    block = row + s * 17
    return (
        tl.load(block[:, :, None] + 1 + j, mask=inside[:, :, None], other=0).to(tl.int32),
        tl.load(block, mask=inside, other=0),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return ((parts[0] << (24 - 8 * r)) >> 24).to(tl.float32)


@jit
def _columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 32 * s + 2 * j + r


TYPE = blocks.BlockType(
    name="Q8_0", weights=32, bytes=34, word=torch.int16, segments=1, segment_words=16, groups=1, planes=2,
    load=_load, scales=_scales, codes=_codes, columns=_columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 32 x 34] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q8_0 blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 32 x 34]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q8_0 blocks")
