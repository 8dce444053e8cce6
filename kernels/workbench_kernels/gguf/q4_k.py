"""Q4_K: 256 weights in 144 bytes (4.5 bits a weight) as 8 runs of 32, w = (d x scale) x q - (dmin x min).

    bytes 0-1     d       float16
    bytes 2-3     dmin    float16
    bytes 4-15    scale and min of the eight runs, 6 bits each:
                  runs 0-3: scale in the low 6 bits of byte 4 + run, min in those of byte 8 + run
                  runs 4-7: low 4 bits of scale and min in the halves of byte 8 + run (low: scale), their upper 2
                            bits in the upper 2 bits of bytes run (scale) and 4 + run (min)
    bytes 16-143  q       4 bits each: byte 32c + b holds weight 64c + b (low half) and 64c + 32 + b (high half)

Planes: q, the rest. A segment is one c: eight words, run 2c in the low halves, 2c + 1 in the high ones.
Source of the layout: llama.cpp, ggml-common.h, `block_q4_K`, and `get_scale_min_k4`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Cuda, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import byte_of, half_of, pair_at, plane_at, words_at


def run_scales(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 16 bytes of Q4_K and Q5_K blocks, uint8 [n, 16] -> scales and mins, float32 [n, 8] each."""
    d, dmin = halves(data[:, :4]).chunk(2, dim=1)
    low, middle, high = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    least = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1)
    return d * scale.float(), dmin * least.float()


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 144] -> float32 [n, 256]."""
    scale, least = run_scales(data[:, :16])
    codes = cut(data[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32).float()
    return (scale[:, :, None] * codes - least[:, :, None]).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, c = first + s // 4, s % 4
    head = plane_at(w, count, 128, 16, block)
    both, low = pair_at(head, 0, inside)
    middle, high = pair_at(head, 1, inside)
    return (
        words_at(plane_at(w, count, 0, 128, block) + 16 * c, j, inside),
        both,
        low,
        middle,
        high,
    )


@jit
def scales(parts, s, g: tl.constexpr):
    # Scale and -min of run 0-7, from the block's first four words.
    run = 2 * (s % 4) + g
    low, middle, high = byte_of(parts[2], run % 4), byte_of(parts[3], run % 4), byte_of(parts[4], run % 4)
    scale = tl.where(run < 4, low & 63, (high & 15) | ((low >> 6) << 4))
    least = tl.where(run < 4, middle & 63, (high >> 4) | ((middle >> 6) << 4))
    return half_of(parts[1]) * scale.to(tl.float32), -half_of(parts[1] >> 16) * least.to(tl.float32)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return (parts[0] >> (4 * g)) & 0x0F0F0F0F


@jit
def columns(s, g: tl.constexpr, q: tl.constexpr):
    return 64 * s + 32 * g


SCALES = """
// Of run 2 t + e.
__device__ Scales scales(const Unit& unit, int t, int d, int e, int odd) {
    const Four head = unit.four[FOURS - 1];
    const int down = 16 * (t % 2);
    const u32 low = head.at[1] >> down, middle = head.at[2] >> down, high = head.at[3] >> down;
    const u32 scale = t < 2 ? low & 0x3F3F : (high & 0x0F0F) | (low >> 2 & 0x3030);
    const u32 least = t < 2 ? middle & 0x3F3F : (high >> 4 & 0x0F0F) | (middle >> 2 & 0x3030);
    float of_scales, of_mins;
    halves(head.at[0], of_scales, of_mins);
    return {of_scales * byte_of(scale, e), -of_mins * byte_of(least, e)};
}
__device__ int column(int i, int group) { return 64 * (i / 2) + 16 * (i % 2) + 32 * group; }
"""
CUDA = (
    SCALES
    + """
__device__ const char* place(const char* w, long long count, long long block, int t, int f) {
    return f < 2 ? w + 128 * block + 16 * (t + 4 * f) : w + 128 * count + 16 * block;
}
__device__ u32 codes(const Unit& unit, int t, int j, int group, int q) {
    return unit.four[j].at[q] >> 4 * group & 0x0F0F0F0F;
}
"""
)

TYPE = BlockType(
    "Q4_K",
    Layout(weights=256, planes=((16, 144), (0, 16)), segments=4, segment_words=8, groups=2, quads=1),
    Unpacking(load=_load, scales=scales, codes=_codes, columns=columns),
    shifted=True,
    reference=reference,
    cuda=Cuda(3, 0, CUDA),
)
