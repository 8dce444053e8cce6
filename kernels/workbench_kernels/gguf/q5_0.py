"""Q5_0: 32 weights in 22 bytes (5.5 bits a weight), w = d x (q - 16).

    bytes 0-1    d    float16
    bytes 2-5    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 6-21   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (22 is no multiple of 4): word j of the codes holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of
from workbench_kernels.gguf.q4_0 import columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 22] -> float32 [n, 32]."""
    scale = data[:, :2].contiguous().view(torch.float16).float()
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    upper = ((data[:, 2:6, None] >> bits) & 1).view(-1, 32)
    codes = torch.cat([data[:, 6:] & 15, data[:, 6:] >> 4], dim=1) | (upper << 4)
    return scale * (codes.float() - 16)


@jit
def _load(row, s, j, inside):
    block = row + s * 11
    upper = (block + 1)[:, :, None] + 0 * j
    return (
        tl.load(block[:, :, None] + 3 + j, mask=inside[:, :, None], other=0).to(tl.int32),
        tl.load(block, mask=inside, other=0),
        tl.load(upper, mask=inside[:, :, None], other=0).to(tl.int32) >> (2 * j),
        tl.load(upper + 1, mask=inside[:, :, None], other=0).to(tl.int32) >> (2 * j),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, -16.0 * scale


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    lower = (parts[0] >> (8 * (r % 2) + 4 * (r // 2))) & 15
    return (lower | (((parts[2 + r // 2] >> (r % 2)) & 1) << 4)).to(tl.float32)


TYPE = blocks.BlockType(
    name="Q5_0", weights=32, bytes=22, word=torch.int16, segments=1, segment_words=8, groups=1, planes=4,
    load=_load, scales=_scales, codes=_codes, columns=columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 32 x 22] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q5_0 blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 32 x 22]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q5_0 blocks")
