"""IQ4_NL: 32 weights in 18 bytes (4.5 bits a weight), w = d x LEVELS[q]: sixteen levels, denser near zero.

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Planes and segments are Q4_0's. A level is found by permuting the bytes of four words of four levels each, as
llama.cpp does: a table in memory would cost a load a weight.
Source of the layout and the levels: llama.cpp, ggml-common.h, `block_iq4_nl` and `kvalues_iq4nl`.
"""

import torch

from workbench_kernels.backend import jit, permuted, tl
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
def codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    """The levels, and 128, of the codes in the halves `q` of a word's bytes (0: low), a byte each."""
    every_other = tl.full(parts[0].shape, 0x6420 + 0x1111 * q, tl.int32)
    return permuted(_levels(parts[0]), _levels(parts[0] >> 16), every_other)


@jit
def _levels(word):
    """The levels of the four codes of a word's lower 16 bits, in their order."""
    # Eight levels are two words, and three bits of a code select one of their bytes; the fourth selects which eight.
    below, above = word & 0x7777, ((word & 0x8888) >> 1) | 0x3210
    # The levels and 128, the lowest code in the lowest byte; the last two are 0xA6998D81 and 0xF1D9C5B5.
    first, second = tl.full(word.shape, 0x3F2D1801, tl.int32), tl.full(word.shape, 0x766A5D4F, tl.int32)
    third, fourth = tl.full(word.shape, -1499886207, tl.int32), tl.full(word.shape, -237386315, tl.int32)
    return permuted(permuted(first, second, below), permuted(third, fourth, below), above)


TYPE = BlockType(
    "IQ4_NL",
    Layout(weights=32, planes=((2, 18), (0, 2)), segments=1, segment_words=4, groups=1, quads=2, less=128),
    Unpacking(load=load, scales=scales, codes=codes, columns=columns),
    shifted=False,
    reference=reference,
)
