"""Q4_1: 32 weights in 20 bytes (5 bits a weight), w = d x q + m.

    bytes 0-1    d    float16
    bytes 2-3    m    float16
    bytes 4-19   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 32-bit words, five a block: word j of the codes holds weights 4j ... 4j + 3 and the same + 16. llama.cpp takes
this type and Q5_0, Q5_1 where rows are no multiple of 256.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_1`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 20] -> float32 [n, 32]."""
    scale, least = data[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)
    return scale * torch.cat([data[:, 4:] & 15, data[:, 4:] >> 4], dim=1).float() + least


@jit
def _load(row, s, j, inside):
    block = row + s * 5
    return (
        tl.load(block[:, :, None] + 1 + j, mask=inside[:, :, None], other=0),
        tl.load(block, mask=inside, other=0),
    )


@jit
def scales(parts, s, g: tl.constexpr):
    return half_of(parts[1]), half_of(parts[1] >> 16)


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return ((parts[0] >> (8 * (r % 4) + 4 * (r // 4))) & 15).to(tl.float32)


@jit
def columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 32 * s + 4 * j + r % 4 + 16 * (r // 4)


TYPE = blocks.BlockType(
    name="Q4_1", weights=32, bytes=20, word=torch.int32, segments=1, segment_words=4, groups=1, planes=8,
    load=_load, scales=scales, codes=_codes, columns=columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 32 x 20] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q4_1 blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 32 x 20]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q4_1 blocks")
