"""Q4_1: 32 weights in 20 bytes (5 bits a weight), w = d x q + m.

    bytes 0-1    d    float16
    bytes 2-3    m    float16
    bytes 4-19   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Planes: q, d and m. A segment is a block: word j of four holds weights 4j ... 4j + 3 and the same + 16. llama.cpp takes
this type and Q5_0, Q5_1 where rows are no multiple of 256.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_1`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import half_of, plane_at, word_at, words_at


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 20] -> float32 [n, 32]."""
    scale, least = halves(data[:, :4]).chunk(2, dim=1)
    return scale * cut(data[:, 4:], 4).reshape(-1, 32).float() + least


@jit
def _load(w, count, first, s, j, inside):
    block = first + s
    return words_at(plane_at(w, count, 0, 16, block), j, inside), word_at(plane_at(w, count, 16, 4, block), 0, inside)


@jit
def scales(parts, s, g: tl.constexpr):
    return half_of(parts[1]), half_of(parts[1] >> 16)


@jit
def codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return (parts[0] >> (4 * q)) & 0x0F0F0F0F


@jit
def columns(s, g: tl.constexpr, q: tl.constexpr):
    return 32 * s + 16 * q


CODES = """
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    return unit.four[j].at[q] >> 4 * group & 0x0F0F0F0F;
}
__device__ int column(int i, int group) { return 32 * i + 16 * group; }
"""
CUDA = (
    CODES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 16 * block + 16 * (t + 4 * f) : w + 16 * count + 4 * (block + 2 * t + f - 2);
}
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    Scales found;
    halves(unit.word[e], found.scale, found.shift);
    return found;
}
"""
)

TYPE = BlockType(
    "Q4_1",
    Layout(weights=32, planes=((4, 20), (0, 4)), segments=1, segment_words=4, groups=1, quads=2),
    Unpacking(load=_load, scales=scales, codes=codes, columns=columns),
    shifted=True,
    reference=reference,
    cuda=Cuda(2, 2, CUDA),
)
