"""IQ4_XS: 256 weights in 136 bytes (4.25 bits a weight) as 8 runs of 32, w = d x (scale - 32) x LEVELS[q].

    bytes 0-1     d      float16
    bytes 2-3     upper 2 bits of each run's scale, run 0 lowest
    bytes 4-7     lower 4 bits of each run's scale, run 0 in the low half of byte 4
    bytes 8-135   q      4 bits each, 16 bytes a run: byte b holds weight b (low half) and b + 16 (high half)

The levels are IQ4_NL's. Read in 32-bit words, 34 a block. A segment is a run: four words.
Source of the layout: llama.cpp, ggml-common.h, `block_iq4_xs`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of
from workbench_kernels.gguf.iq4_nl import level_of, levels_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 136] -> float32 [n, 256]."""
    d = data[:, :2].contiguous().view(torch.float16).float()
    lower = torch.stack([data[:, 4:8] & 15, data[:, 4:8] >> 4], dim=2).view(-1, 8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    upper = ((data[:, 2:4, None] >> shifts) & 3).reshape(-1, 8)
    scale = d * ((lower | (upper << 4)).float() - 32)
    q = data[:, 8:].reshape(-1, 8, 16)
    return (scale[:, :, None] * levels_of(torch.cat([q & 15, q >> 4], dim=2))).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, run = row + (s // 8) * 34, s % 8
    return (
        tl.load((block + 2 + 4 * run)[:, :, None] + j, mask=inside[:, :, None], other=0),
        tl.load(block, mask=inside, other=0),
        tl.load(block + 1, mask=inside, other=0),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    run = s % 8
    lower, upper = (parts[2] >> (4 * run)) & 15, (parts[1] >> (16 + 2 * run)) & 3
    scale = half_of(parts[1]) * ((lower | (upper << 4)) - 32).to(tl.float32)
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return level_of((parts[0] >> (8 * (r % 4) + 4 * (r // 4))) & 15)


@jit
def _columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 32 * s + 4 * j + r % 4 + 16 * (r // 4)


TYPE = blocks.BlockType(
    name="IQ4_XS", weights=256, bytes=136, word=torch.int32, segments=8, segment_words=4, groups=1, planes=8,
    load=_load, scales=_scales, codes=_codes, columns=_columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 256 x 136] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="IQ4_XS blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 256 x 136]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="IQ4_XS blocks")
