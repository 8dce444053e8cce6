"""Q5_0: 32 weights in 22 bytes (5.5 bits a weight), w = d x (q - 16).

    bytes 0-1    d    float16
    bytes 2-5    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 6-21   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words (22 is no multiple of 4): word j of the codes holds weights 2j, 2j + 1, 2j + 16, 2j + 17.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, half_of, halves, pairs_at, word_at
from workbench_kernels.gguf.q4_1 import columns
from workbench_kernels.gguf.q5_1 import codes, codes_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 22] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (codes_of(data[:, 2:]) - 16)


@jit
def _load(row, s, j, inside):
    block = row + s * 11
    return (
        pairs_at(block + 3, j, inside),
        word_at(block, inside),
        pairs_at(block + 1, 0 * j, inside) >> (4 * j),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


TYPE = BlockType(
    "Q5_0",
    Layout(weights=32, size_bytes=22, word=torch.int16, segments=1, segment_words=4, groups=1, quads=2, less=16),
    Unpacking(load=_load, scales=_scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
)
