"""Q4_0: 32 weights in 18 bytes (4.5 bits a weight), w = d x (q - 8).

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (18 is no multiple of 4): word j of a block's eight holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, half_of, halves, word_at, words_at


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (cut(data[:, 2:], 4).reshape(-1, 32).float() - 8)


@jit
def load(row, s, j, inside):
    block = row + s * 9
    return words_at(block + 1, j, inside), word_at(block, inside)


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, -8.0 * scale


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return ((parts[0] >> (8 * (r % 2) + 4 * (r // 2))) & 15).to(tl.float32)


@jit
def columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 32 * s + 2 * j + r % 2 + 16 * (r // 2)


TYPE = BlockType(
    "Q4_0",
    Layout(weights=32, size_bytes=18, word=torch.int16, segments=1, segment_words=8, groups=1, planes=4),
    Unpacking(load=load, scales=_scales, codes=_codes, columns=columns),
    reference,
)
