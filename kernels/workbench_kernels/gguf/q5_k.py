"""Q5_K: 256 weights in 176 bytes (5.5 bits a weight) as 8 runs of 32, w = (d x scale) x q - (dmin x min).

    bytes 0-15    d, dmin and the runs' scales and mins, as in Q4_K
    bytes 16-47   upper bit of q: weight 32 run + b has bit `run` of byte 16 + b
    bytes 48-175  lower 4 bits of q, as in Q4_K

Read in 32-bit words, 44 a block. A segment is one c, as in Q4_K; its eight words of upper bits are the block's.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, word_at, words_at
from workbench_kernels.gguf.q4_k import columns, run_scales, scales


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 176] -> float32 [n, 256]."""
    scale, least = run_scales(data[:, :16])
    codes = cut(data[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32) | (cut(data[:, 16:48], 1) << 4)
    return (scale[:, :, None] * codes.float() - least[:, :, None]).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, c = row + (s // 4) * 44, s % 4
    return (
        words_at(block + 12 + c * 8, j, inside),
        word_at(block, inside),
        word_at(block + 1, inside),
        word_at(block + 2, inside),
        word_at(block + 3, inside),
        words_at(block + 4, j, inside),
    )


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return ((parts[0] >> (4 * g)) & 0x0F0F0F0F) | (((parts[5] >> (2 * (s % 4) + g)) & 0x01010101) << 4)


TYPE = BlockType(
    "Q5_K",
    Layout(weights=256, size_bytes=176, word=torch.int32, segments=4, segment_words=8, groups=2, quads=1),
    Unpacking(load=_load, scales=scales, codes=_codes, columns=columns),
    shifted=True,
    reference=reference,
)
