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
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, byte_of, cut, half_of, halves, word_at, words_at


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 84] -> float32 [n, 256]."""
    d, dmin = halves(data[:, 80:]).chunk(2, dim=1)
    scale, least = d * (data[:, :16] & 15).float(), dmin * (data[:, :16] >> 4).float()
    codes = cut(data[:, 16:80].reshape(-1, 2, 32), 2).view(-1, 16, 16).float()
    return (scale[:, :, None] * codes - least[:, :, None]).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, h, i = row + (s // 4) * 21, (s // 2) % 2, s % 2
    return (
        words_at(block + 4 + 8 * h + 4 * i, j, inside),
        word_at(block + 20, inside),
        word_at(block + 2 * h, inside),
        word_at(block + 2 * h + 1, inside),
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
    Layout(weights=256, size_bytes=84, word=torch.int32, segments=4, segment_words=4, groups=4, quads=1),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    shifted=True,
    reference=reference,
)
