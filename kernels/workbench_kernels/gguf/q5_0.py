"""Q5_0: 32 weights in 22 bytes (5.5 bits a weight), w = d x (q - 16).

    bytes 0-1    d    float16
    bytes 2-5    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 6-21   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (22 is no multiple of 4): word j of the codes holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, half_of, halves, word_at, words_at
from workbench_kernels.gguf.q4_0 import columns


def codes_of(data: torch.Tensor) -> torch.Tensor:
    """The last 20 bytes of Q5_0 and Q5_1 blocks, uint8 [n, 20] -> codes, float32 [n, 32]."""
    upper = cut(data[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return (cut(data[:, 4:], 4).reshape(-1, 32) | (upper << 4)).float()


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 22] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (codes_of(data[:, 2:]) - 16)


@jit
def _load(row, s, j, inside):
    block = row + s * 11
    return (
        words_at(block + 3, j, inside),
        word_at(block, inside),
        words_at(block + 1, 0 * j, inside) >> (2 * j),
        words_at(block + 2, 0 * j, inside) >> (2 * j),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, -16.0 * scale


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    lower = (parts[0] >> (8 * (r % 2) + 4 * (r // 2))) & 15
    return (lower | (((parts[2 + r // 2] >> (r % 2)) & 1) << 4)).to(tl.float32)


TYPE = BlockType(
    "Q5_0",
    Layout(weights=32, size_bytes=22, word=torch.int16, segments=1, segment_words=8, groups=1, planes=4),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    reference,
)
