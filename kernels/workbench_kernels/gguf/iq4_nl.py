"""IQ4_NL: 32 weights in 18 bytes (4.5 bits a weight), w = d x LEVELS[q]: sixteen levels, denser near zero.

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Planes and segments are Q4_0's. A level is found by selecting one of four words of four levels each and shifting: a
table in memory would cost a load a weight.
Source of the layout and the levels: llama.cpp, ggml-common.h, `block_iq4_nl` and `kvalues_iq4nl`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.q4_0 import load
from workbench_kernels.gguf.q4_1 import columns
from workbench_kernels.gguf.q8_0 import scales

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0-15 -> levels, float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[codes.long()]


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    return halves(data[:, :2]) * levels_of(cut(data[:, 2:], 4).reshape(-1, 32))


@jit
def levels_at(word):
    """The codes 0-15 in the lower halves of a word's bytes -> their levels and 128, a byte each."""
    return (
        _level(word & 15)
        | (_level((word >> 8) & 15) << 8)
        | (_level((word >> 16) & 15) << 16)
        | (_level((word >> 24) & 15) << 24)
    )


@jit
def _level(q):
    # Four levels, and 128, to a word, the lowest code in the lowest byte.
    low = tl.where(q < 4, 0x3F2D1801, 0x766A5D4F)
    high = tl.where(q < 12, -1499886207, -237386315)  # 0xA6998D81, 0xF1D9C5B5
    return (tl.where(q < 8, low, high) >> (8 * (q % 4))) & 255


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    return levels_at(parts[0] >> (4 * q))


TYPE = BlockType(
    "IQ4_NL",
    Layout(weights=32, planes=((2, 18), (0, 2)), segments=1, segment_words=4, groups=1, quads=2, less=128),
    Unpacking(load=load, scales=scales, codes=_codes, columns=columns),
    shifted=False,
    reference=reference,
)
