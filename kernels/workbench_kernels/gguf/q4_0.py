"""Q4_0: 32 weights in 18 bytes (4.5 bits a weight), w = d x (q - 8).

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Planes: q, d. A segment is a block: word j of four holds weights 4j ... 4j + 3 and the same + 16.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import half_of, plane_at, short_at, words_at
from workbench_kernels.gguf.q4_1 import CODES, codes, columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    return halves(data[:, :2]) * (cut(data[:, 2:], 4).reshape(-1, 32).float() - 8)


@jit
def load(w, count, first, s, j, inside):
    block = first + s
    return words_at(plane_at(w, count, 0, 16, block), j, inside), short_at(plane_at(w, count, 16, 2, block), inside)


@jit
def _scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


CUDA = (
    CODES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 16 * block + 16 * (t + 4 * f) : w + 16 * count + 2 * block + 4 * t;
}
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    return {half_of(unit.word[0] >> 16 * e), 0};
}
"""
)

TYPE = BlockType(
    "Q4_0",
    Layout(weights=32, planes=((2, 18), (0, 2)), segments=1, segment_words=4, groups=1, quads=2, less=8),
    Unpacking(load=load, scales=_scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
    cuda=Cuda(2, 1, CUDA),
)
