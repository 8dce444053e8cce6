"""Q5_K: 256 weights in 176 bytes (5.5 bits a weight) as 8 runs of 32, w = (d x scale) x q - (dmin x min).

    bytes 0-15    d, dmin and the runs' scales and mins, as in Q4_K
    bytes 16-47   upper bit of q: weight 32 run + b has bit `run` of byte 16 + b
    bytes 48-175  lower 4 bits of q, as in Q4_K

Planes: lower bits, upper bits, the rest. A segment is one c, as in Q4_K; its eight words of upper bits are the block's.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut
from workbench_kernels.gguf.loads import pair_at, plane_at, words_at
from workbench_kernels.gguf.q4_k import SCALES, columns, run_scales, scales


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 176] -> float32 [n, 256]."""
    scale, least = run_scales(data[:, :16])
    codes = cut(data[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32) | (cut(data[:, 16:48], 1) << 4)
    return (scale[:, :, None] * codes.float() - least[:, :, None]).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, c = first + s // 4, s % 4
    head = plane_at(w, count, 160, 16, block)
    both, low = pair_at(head, 0, inside)
    middle, high = pair_at(head, 1, inside)
    return (
        words_at(plane_at(w, count, 0, 128, block) + 16 * c, j, inside),
        both,
        low,
        middle,
        high,
        words_at(plane_at(w, count, 128, 32, block), j, inside),
    )


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return ((parts[0] >> (4 * g)) & 0x0F0F0F0F) | (((parts[5] >> (2 * (s % 4) + g)) & 0x01010101) << 4)


CUDA = (
    SCALES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 128 * block + 16 * (t + 4 * f)
        : f == 2 ? w + 128 * count + 32 * block + 16 * (t % 2) : w + 160 * count + 16 * block;
}
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    const u32 upper = unit.four[2].at[q] >> (t & 2) + 4 * j + group;
    return (unit.four[j].at[q] >> 4 * group & 0x0F0F0F0F) | (upper << 4 & 0x10101010);
}
"""
)

TYPE = BlockType(
    "Q5_K",
    Layout(weights=256, planes=((48, 176), (16, 48), (0, 16)), segments=4, segment_words=8, groups=2, quads=1),
    Unpacking(load=_load, scales=scales, codes=_codes, columns=columns),
    shifted=True,
    reference=reference,
    cuda=Cuda(4, 0, CUDA),
)
