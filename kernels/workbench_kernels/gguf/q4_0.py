"""Q4_0: 32 weights in 18 bytes (4.5 bits a weight), w = d x (q - 8).

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (18 is no multiple of 4): word j of a block's eight holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, half_of, halves, pairs_at, word_at
from workbench_kernels.gguf.q4_1 import codes, columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (cut(data[:, 2:], 4).reshape(-1, 32).float() - 8)


@jit
def load(row, s, j, inside):
    block = row + s * 9
    return pairs_at(block + 1, j, inside), word_at(block, inside)


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


TYPE = BlockType(
    "Q4_0",
    Layout(weights=32, size_bytes=18, word=torch.int16, segments=1, segment_words=4, groups=1, quads=2, less=8),
    Unpacking(load=load, scales=_scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
)
