"""Q8_0: 32 weights in 34 bytes (8.5 bits a weight), w = d x q.

    bytes 0-1    d    float16
    bytes 2-33   q    int8, one a weight, in order

Planes: q, d. A segment is a block: word j of eight holds weights 4j ... 4j + 3.
Source of the layout: llama.cpp, ggml-common.h, `block_q8_0`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, halves
from workbench_kernels.gguf.loads import half_of, plane_at, short_at, words_at


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 34] -> float32 [n, 32]."""
    return halves(data[:, :2]) * data[:, 2:].view(torch.int8).float()


@jit
def _load(w, count, first, s, j, inside):
    block = first + s
    return words_at(plane_at(w, count, 0, 32, block), j, inside), short_at(plane_at(w, count, 32, 2, block), inside)


@jit
def scales(parts, s, g: tl.constexpr):
    scale = half_of(parts[1])
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    # Two's complement, with the upper bit turned over: the code and 128.
    return parts[0] ^ -0x7F7F7F80


@jit
def _columns(s, g: tl.constexpr, q: tl.constexpr):
    return 32 * s


CUDA = """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 4 ? w + 32 * block + 16 * (t + 4 * f) : w + 32 * count + 2 * block + 4 * t;
}
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    return unit.four[j].at[q] ^ 0x80808080;
}
__device__ int column(int i, int group) { return 16 * i; }
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    return {half_of(unit.word[0] >> 16 * e), 0};
}
"""

TYPE = BlockType(
    "Q8_0",
    Layout(weights=32, planes=((2, 34), (0, 2)), segments=1, segment_words=8, groups=1, quads=1, less=128),
    Unpacking(load=_load, scales=scales, codes=_codes, columns=_columns),
    shifted=False,
    reference=reference,
    cuda=Cuda(4, 1, CUDA),
)
