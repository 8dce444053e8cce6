"""Q5_1: 32 weights in 24 bytes (6 bits a weight), w = d x q + m.

    bytes 0-1    d    float16
    bytes 2-3    m    float16
    bytes 4-7    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 8-23   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 32-bit words, six a block: word j of the codes holds weights 4j ... 4j + 3 and the same + 16.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_1`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.q4_1 import columns, scales


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 24] -> float32 [n, 32]."""
    scale, least = data[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    upper = ((data[:, 4:8, None] >> bits) & 1).view(-1, 32)
    codes = torch.cat([data[:, 8:] & 15, data[:, 8:] >> 4], dim=1) | (upper << 4)
    return scale * codes.float() + least


@jit
def _load(row, s, j, inside):
    block = row + s * 6
    return (
        tl.load(block[:, :, None] + 2 + j, mask=inside[:, :, None], other=0),
        tl.load(block, mask=inside, other=0),
        tl.load((block + 1)[:, :, None] + 0 * j, mask=inside[:, :, None], other=0) >> (4 * j),
    )


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    lower = (parts[0] >> (8 * (r % 4) + 4 * (r // 4))) & 15
    return (lower | (((parts[2] >> (r % 4 + 16 * (r // 4))) & 1) << 4)).to(tl.float32)


TYPE = blocks.BlockType(
    name="Q5_1", weights=32, bytes=24, word=torch.int32, segments=1, segment_words=4, groups=1, planes=8,
    load=_load, scales=scales, codes=_codes, columns=columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 32 x 24] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q5_1 blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 32 x 24]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q5_1 blocks")
