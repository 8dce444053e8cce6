"""Q5_1: 32 weights in 24 bytes (6 bits a weight), w = d x q + m.

    bytes 0-1    d    float16
    bytes 2-3    m    float16
    bytes 4-7    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 8-23   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Planes: lower bits, the rest. A segment is a block: word j of its four of lower bits holds those of weights
4j ... 4j + 3 and the same + 16.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_1`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import pair_at, plane_at, words_at
from workbench_kernels.gguf.q4_1 import columns, scales


def codes_of(data: torch.Tensor) -> torch.Tensor:
    """The last 20 bytes of Q5_0 and Q5_1 blocks, uint8 [n, 20] -> codes, float32 [n, 32]."""
    upper = cut(data[:, :4], 1).transpose(1, 2).reshape(-1, 32)
    return (cut(data[:, 4:], 4).reshape(-1, 32) | (upper << 4)).float()


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 24] -> float32 [n, 32]."""
    scale, least = halves(data[:, :4]).chunk(2, dim=1)
    return scale * codes_of(data[:, 4:]) + least


@jit
def _load(w, count, first, s, j, inside):
    block = first + s
    both, upper = pair_at(plane_at(w, count, 16, 8, block), 0, inside)
    return words_at(plane_at(w, count, 0, 16, block), j, inside), both, upper[:, :, None] >> (4 * j)


@jit
def fifth_bits(bits):
    """The lowest four bits, one in bit 4 of each byte, the lowest in the lowest."""
    # Bit k is moved 7 k further, to 8 k; the products do not overlap.
    return (((bits & 15) * 0x00204081) & 0x01010101) << 4


@jit
def codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return ((parts[0] >> (4 * q)) & 0x0F0F0F0F) | fifth_bits(parts[2] >> (16 * q))


CODES = """
// Four bits from bit 16 group + 4 q on, each the upper one of a byte.
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    const u32 upper = (unit.word[j] >> 16 * group + 4 * q & 15) * 0x00204081 & 0x01010101;
    return (unit.four[j].at[q] >> 4 * group & 0x0F0F0F0F) | upper << 4;
}
__device__ int column(int i, int group) { return 32 * i + 16 * group; }
"""
CUDA = (
    CODES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 16 * block + 16 * (t + 4 * f)
        : f < 4 ? w + 16 * count + 8 * (block + t + 4 * (f - 2)) + 4 : w + 16 * count + 8 * (block + 2 * t + f - 4);
}
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    Scales found;
    halves(unit.word[2 + e], found.scale, found.shift);
    return found;
}
"""
)

TYPE = BlockType(
    "Q5_1",
    Layout(weights=32, planes=((8, 24), (0, 8)), segments=1, segment_words=4, groups=1, quads=2),
    Unpacking(load=_load, scales=scales, codes=codes, columns=columns),
    shifted=True,
    reference=reference,
    cuda=Cuda(2, 4, CUDA),
)
