"""Q2_K: 256 weights in 84 bytes (2.625 bits a weight) as 16 runs of 16, w = (d x scale) x q - (dmin x min).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-15    a run each: scale in the low half, min in the high half; weight 128h + 32v + b is in run
                  8h + 2v + b // 16
    bytes 16-79   q, 2 bits each: bits 2v, 2v + 1 of byte 16 + 32h + b
    bytes 80-81   d, float16
    bytes 82-83   dmin, float16

Planes: q, the runs' scales and mins, d and dmin. A segment is (h, b // 16): four words.
Source of the layout: llama.cpp, ggml-common.h, `block_q2_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import byte_of, half_of, pair_at, plane_at, word_at, words_at


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 84] -> float32 [n, 256]."""
    d, dmin = halves(data[:, 80:]).chunk(2, dim=1)
    scale, least = d * (data[:, :16] & 15).float(), dmin * (data[:, :16] >> 4).float()
    codes = cut(data[:, 16:80].reshape(-1, 2, 32), 2).view(-1, 16, 16).float()
    return (scale[:, :, None] * codes - least[:, :, None]).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, h, i = first + s // 4, (s // 2) % 2, s % 2
    low, high = pair_at(plane_at(w, count, 64, 16, block), h, inside)
    return (
        words_at(plane_at(w, count, 0, 64, block) + 16 * h + 8 * i, j, inside),
        word_at(plane_at(w, count, 80, 4, block), 0, inside),
        low,
        high,
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    both = byte_of(parts[2 + g // 2], 2 * (g % 2) + s % 2)
    return half_of(parts[1]) * (both & 15).to(tl.float32), -half_of(parts[1] >> 16) * (both >> 4).to(tl.float32)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return (parts[0] >> (2 * g)) & 0x03030303


@jit
def columns(s, g: tl.constexpr, q: tl.constexpr):
    return 128 * (s // 2) + 32 * g + 16 * (s % 2)


TYPE = BlockType(
    "Q2_K",
    Layout(weights=256, planes=((16, 80), (0, 16), (80, 84)), segments=4, segment_words=4, groups=4, quads=1),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    shifted=True,
    reference=reference,
)
