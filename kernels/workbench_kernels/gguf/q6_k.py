"""Q6_K: 256 weights in 210 bytes (6.5625 bits a weight) as 16 runs of 16, w = (d x scale) x (q - 32).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-127    lower 4 bits of q: byte 64h + b + 32 (v % 2), low half for v = 0, 1, high half for v = 2, 3
    bytes 128-191  upper 2 bits of q: bits 2v, 2v + 1 of byte 128 + 32h + b
    bytes 192-207  scale, int8 a run: weight 128h + 32v + b is in run 8h + 2v + b // 16
    bytes 208-209  d, float16

Read in 16-bit words (210 is no multiple of 4), 105 a block. A segment is (h, b // 16): eight words of each of the two
rows of lower bits and eight of upper bits. Source of the layout: llama.cpp, ggml-common.h, `block_q6_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, half_of, halves, pairs_at, word_at
from workbench_kernels.gguf.q2_k import columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 210] -> float32 [n, 256]."""
    scale = halves(data[:, 208:]) * data[:, 192:208].view(torch.int8).float()
    lower = cut(data[:, :128].reshape(-1, 2, 64), 4).view(-1, 2, 4, 32)
    upper = cut(data[:, 128:192].reshape(-1, 2, 32), 2)
    codes = (lower | (upper << 4)).view(-1, 16, 16).float() - 32
    return (scale[:, :, None] * codes).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, h, i = row + (s // 4) * 105, (s // 2) % 2, s % 2
    lower, scale = block + 32 * h + 8 * i, block + 96 + 4 * h
    return (
        pairs_at(lower, j, inside),
        pairs_at(lower + 16, j, inside),
        pairs_at(block + 64 + 16 * h + 8 * i, j, inside),
        word_at(block + 104, inside),
        word_at(scale, inside),
        word_at(scale + 1, inside),
        word_at(scale + 2, inside),
        word_at(scale + 3, inside),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    # Word 96 + 4h + g holds the int8 scales of runs 8h + 2g and 8h + 2g + 1.
    scale = half_of(parts[3]) * ((parts[4 + g] << (24 - 8 * (s % 2))) >> 24).to(tl.float32)
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    lower, upper = (parts[g % 2] >> (4 * (g // 2))) & 0x0F0F0F0F, (parts[2] >> (2 * g)) & 0x03030303
    return lower | (upper << 4)


TYPE = BlockType(
    "Q6_K",
    Layout(weights=256, size_bytes=210, word=torch.int16, segments=4, segment_words=4, groups=4, quads=1, less=32),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    shifted=False,
    reference=reference,
)
