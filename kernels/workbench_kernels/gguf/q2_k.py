"""Q2_K: 256 weights in 84 bytes (2.625 bits a weight) as 16 runs of 16, w = (d x scale) x q - (dmin x min).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-15    a run each: scale in the low half, min in the high half; weight 128h + 32v + b is in run
                  8h + 2v + b // 16
    bytes 16-79   q, 2 bits each: bits 2v, 2v + 1 of byte 16 + 32h + b
    bytes 80-81   d, float16
    bytes 82-83   dmin, float16

Read in 32-bit words, 21 a block. A segment is (h, b // 16): four words.
Source of the layout: llama.cpp, ggml-common.h, `block_q2_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import byte_of, half_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 84] -> float32 [n, 256]."""
    d, dmin = data[:, 80:].contiguous().view(torch.float16).float().split(1, dim=1)
    scale, least = d * (data[:, :16] & 15).float(), dmin * (data[:, :16] >> 4).float()
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    codes = (data[:, 16:80].reshape(-1, 2, 1, 32) >> shifts[:, None]) & 3
    return (scale[:, :, None] * codes.view(-1, 16, 16).float() - least[:, :, None]).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, h, i = row + (s // 4) * 21, (s // 2) % 2, s % 2
    return (
        tl.load((block + 4 + 8 * h + 4 * i)[:, :, None] + j, mask=inside[:, :, None], other=0),
        tl.load(block + 20, mask=inside, other=0),
        tl.load(block + 2 * h, mask=inside, other=0),
        tl.load(block + 2 * h + 1, mask=inside, other=0),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    both = byte_of(parts[2 + g // 2], 2 * (g % 2) + s % 2)
    return half_of(parts[1]) * (both & 15).to(tl.float32), -half_of(parts[1] >> 16) * (both >> 4).to(tl.float32)


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return ((parts[0] >> (8 * r + 2 * g)) & 3).to(tl.float32)


@jit
def _columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 128 * (s // 2) + 32 * g + 16 * (s % 2) + 4 * j + r


TYPE = blocks.BlockType(
    name="Q2_K", weights=256, bytes=84, word=torch.int32, segments=4, segment_words=4, groups=4, planes=4,
    load=_load, scales=_scales, codes=_codes, columns=_columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 256 x 84] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q2_K blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 256 x 84]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q2_K blocks")
