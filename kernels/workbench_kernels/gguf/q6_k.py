"""Q6_K: 256 weights in 210 bytes (6.5625 bits a weight) as 16 runs of 16, w = (d x scale) x (q - 32).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-127    lower 4 bits of q: byte 64h + b + 32 (v % 2), low half for v = 0, 1, high half for v = 2, 3
    bytes 128-191  upper 2 bits of q: bits 2v, 2v + 1 of byte 128 + 32h + b
    bytes 192-207  scale, int8 a run: weight 128h + 32v + b is in run 8h + 2v + b // 16
    bytes 208-209  d, float16

Planes: lower bits, upper bits, scales, d. A segment is (h, b // 16): four words of each of the two rows of lower bits
and four of upper bits. Source of the layout: llama.cpp, ggml-common.h, `block_q6_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import byte_of, half_of, pair_at, plane_at, short_at, words_at
from workbench_kernels.gguf.q2_k import columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 210] -> float32 [n, 256]."""
    scale = halves(data[:, 208:]) * data[:, 192:208].view(torch.int8).float()
    lower = cut(data[:, :128].reshape(-1, 2, 64), 4).view(-1, 2, 4, 32)
    upper = cut(data[:, 128:192].reshape(-1, 2, 32), 2)
    codes = (lower | (upper << 4)).view(-1, 16, 16).float() - 32
    return (scale[:, :, None] * codes).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, h, i = first + s // 4, (s // 2) % 2, s % 2
    lower = plane_at(w, count, 0, 128, block) + 32 * h + 8 * i
    low, high = pair_at(plane_at(w, count, 192, 16, block), h, inside)
    return (
        words_at(lower, j, inside),
        words_at(lower + 16, j, inside),
        words_at(plane_at(w, count, 128, 64, block) + 16 * h + 8 * i, j, inside),
        short_at(plane_at(w, count, 208, 2, block), inside),
        low,
        high,
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    # Run 8h + 2g + i has byte 2g + i, an int8, of the half's eight.
    bits = byte_of(parts[4 + g // 2], 2 * (g % 2) + s % 2)
    scale = half_of(parts[3]) * ((bits ^ 128) - 128).to(tl.float32)
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    lower, upper = (parts[g % 2] >> (4 * (g // 2))) & 0x0F0F0F0F, (parts[2] >> (2 * g)) & 0x03030303
    return lower | (upper << 4)


CUDA = """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 128 * block + 16 * (t + 4 * f)
        : f < 4 ? w + 128 * count + 64 * block + 32 * (f - 2) + 16 * (t % 2)
        : f < 5 ? w + 192 * count + 16 * block : w + 208 * count + 2 * (block & ~1);
}
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    const u32 upper = unit.four[2 + j].at[q] >> (t & 2);
    return (unit.four[j].at[q] >> 4 * group & 0x0F0F0F0F) | (upper << (group ? 0 : 4) & 0x30303030);
}
__device__ int column(int i, int group) { return 128 * (i / 4) + 32 * (i / 2 % 2) + 64 * group + 16 * (i % 2); }
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    const u32 four = t < 2 ? unit.four[4].at[2 * d] : unit.four[4].at[2 * d + 1];
    return {half_of(unit.word[0] >> 16 * odd) * (byte_of(four ^ 0x80808080, t % 2 * 2 + e) - 128), 0};
}
"""

TYPE = BlockType(
    "Q6_K",
    Layout(
        weights=256,
        planes=((0, 128), (128, 192), (192, 208), (208, 210)),
        segments=4,
        segment_words=4,
        groups=4,
        quads=1,
        less=32,
    ),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    shifted=False,
    reference=reference,
    cuda=Cuda(5, 1, CUDA, runs=16),
)
