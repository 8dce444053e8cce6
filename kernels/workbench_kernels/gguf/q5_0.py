"""Q5_0: 32 weights in 22 bytes (5.5 bits a weight), w = d x (q - 16).

    bytes 0-1    d    float16
    bytes 2-5    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 6-21   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Planes: lower bits, upper bits, d. A segment is a block, as in Q5_1.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, halves
from workbench_kernels.gguf.loads import half_of, plane_at, short_at, word_at, words_at
from workbench_kernels.gguf.q4_1 import columns
from workbench_kernels.gguf.q5_1 import CODES, codes, codes_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 22] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (codes_of(data[:, 2:]) - 16)


@jit
def _load(w, count, first, s, j, inside):
    block = first + s
    return (
        words_at(plane_at(w, count, 0, 16, block), j, inside),
        short_at(plane_at(w, count, 20, 2, block), inside),
        word_at(plane_at(w, count, 16, 4, block), 0, inside)[:, :, None] >> (4 * j),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


CUDA = (
    CODES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 16 * block + 16 * (t + 4 * f)
        : f < 4 ? w + 16 * count + 4 * (block + t + 4 * (f - 2)) : w + 20 * count + 2 * block + 4 * t;
}
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    return {half_of(unit.word[2] >> 16 * e), 0};
}
"""
)

TYPE = BlockType(
    "Q5_0",
    Layout(weights=32, planes=((6, 22), (2, 6), (0, 2)), segments=1, segment_words=4, groups=1, quads=2, less=16),
    Unpacking(load=_load, scales=_scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
    cuda=Cuda(2, 3, CUDA),
)
