"""IQ4_NL: 32 weights in 18 bytes (4.5 bits a weight), w = d x LEVELS[q]: sixteen levels, denser near zero.

    bytes 0-1    d    float16
    bytes 2-17   q    4 bits each: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 16-bit words, as Q4_0. A level is found by selecting one of four words of four levels each and shifting: a
table in memory would cost a load a weight.
Source of the layout and the levels: llama.cpp, ggml-common.h, `block_iq4_nl` and `kvalues_iq4nl`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.q4_0 import columns, load
from workbench_kernels.gguf.q8_0 import scales

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def levels_of(codes: torch.Tensor) -> torch.Tensor:
    """Codes 0-15 -> levels, float32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[codes.long()]


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 18] -> float32 [n, 32]."""
    return halves(data[:, :2]) * levels_of(cut(data[:, 2:], 4).reshape(-1, 32))


@jit
def level_of(q):
    """Codes 0-15 -> levels; four levels to a word, the lowest code in the lowest byte."""
    low = tl.where(q < 4, -1079142271, -152379953)  # 0xBFAD9881, 0xF6EADDCF
    high = tl.where(q < 12, 639175937, 1901675829)  # 0x26190D01, 0x71594535
    word = tl.where(q < 8, low, high)
    return ((word << (24 - 8 * (q % 4))) >> 24).to(tl.float32)


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    return level_of((parts[0] >> (8 * (r % 2) + 4 * (r // 2))) & 15)


TYPE = BlockType(
    "IQ4_NL",
    Layout(weights=32, size_bytes=18, word=torch.int16, segments=1, segment_words=8, groups=1, planes=4),
    Unpacking(load=load, scales=scales, codes=_codes, columns=columns),
    reference,
)
