"""Q4_0: 32 weights in 18 bytes (4.5 bits a weight), w = d x (q - 8).

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (18 is no multiple of 4): word j of a block's eight holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    scale = data[:, :2].contiguous().view(torch.float16).float()
    codes = torch.cat([data[:, 2:] & 15, data[:, 2:] >> 4], dim=1)
    return scale * (codes.float() - 8)


@jit
def load(row, s, j, inside):
    block = row + s * 9
    return (
        tl.load(block[:, :, None] + 1 + j, mask=inside[:, :, None], other=0).to(tl.int32),
        tl.load(block, mask=inside, other=0),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, -8.0 * scale


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return ((parts[0] >> (8 * (r % 2) + 4 * (r // 2))) & 15).to(tl.float32)


@jit
def columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 32 * s + 2 * j + r % 2 + 16 * (r // 2)


TYPE = blocks.BlockType(
    name="Q4_0", weights=32, bytes=18, word=torch.int16, segments=1, segment_words=8, groups=1, planes=4,
    load=load, scales=_scales, codes=_codes, columns=columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 32 x 18] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q4_0 blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 32 x 18]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q4_0 blocks")
