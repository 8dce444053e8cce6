"""IQ4_XS: 256 weights in 136 bytes (4.25 bits a weight) as 8 runs of 32, w = d x (scale - 32) x LEVELS[q].

    bytes 0-1     d      float16
    bytes 2-3     upper 2 bits of each run's scale, run 0 lowest
    bytes 4-7     lower 4 bits of each run's scale, run 0 in the low half of byte 4
    bytes 8-135   q      4 bits each, 16 bytes a run: byte b holds weight b (low half) and b + 16 (high half)

The levels are IQ4_NL's. Planes: q, the rest. A segment is a run: four words.
Source of the layout: llama.cpp, ggml-common.h, `block_iq4_xs`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.iq4_nl import codes, levels_of
from workbench_kernels.gguf.layout import BlockType, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import half_of, pair_at, plane_at, words_at
from workbench_kernels.gguf.q4_1 import columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 136] -> float32 [n, 256]."""
    lower = cut(data[:, 4:8], 4).transpose(1, 2).reshape(-1, 8)
    upper = cut(data[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    scale = halves(data[:, :2]) * ((lower | (upper << 4)).float() - 32)
    levels = levels_of(cut(data[:, 8:].reshape(-1, 8, 16), 4).reshape(-1, 8, 32))
    return (scale[:, :, None] * levels).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, run = first + s // 8, s % 8
    low, high = pair_at(plane_at(w, count, 128, 8, block), 0, inside)
    return words_at(plane_at(w, count, 0, 128, block) + 8 * run, j, inside), low, high


@jit
def _scales(parts, s, g: tl.constexpr):
    run = s % 8
    lower, upper = (parts[2] >> (4 * run)) & 15, (parts[1] >> (16 + 2 * run)) & 3
    scale = half_of(parts[1]) * ((lower | (upper << 4)) - 32).to(tl.float32)
    return scale, tl.zeros_like(scale)


TYPE = BlockType(
    "IQ4_XS",
    Layout(weights=256, planes=((8, 136), (0, 8)), segments=8, segment_words=4, groups=1, quads=2, less=128),
    Unpacking(load=_load, scales=_scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
)
