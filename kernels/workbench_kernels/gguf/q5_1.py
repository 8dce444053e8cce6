"""Q5_1: 32 weights in 24 bytes (6 bits a weight), w = d x q + m.

    bytes 0-1    d    float16
    bytes 2-3    m    float16
    bytes 4-7    upper bit of q: weight i has bit i of this 32-bit integer
    bytes 8-23   lower 4 bits of q: byte b holds weight b in its low half and weight b + 16 in its high half

Read in 32-bit words, six a block: word j of the codes holds weights 4j ... 4j + 3 and the same + 16.
Source of the layout: llama.cpp, ggml-common.h, `block_q5_1`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.blocks import BlockType, Layout, Unpacking, halves, word_at, words_at
from workbench_kernels.gguf.q4_1 import columns, scales
from workbench_kernels.gguf.q5_0 import codes_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 24] -> float32 [n, 32]."""
    scale, least = halves(data[:, :4]).chunk(2, dim=1)
    return scale * codes_of(data[:, 4:]) + least


@jit
def _load(row, s, j, inside):
    block = row + s * 6
    return (
        words_at(block + 2, j, inside),
        word_at(block, inside),
        words_at(block + 1, 0 * j, inside) >> (4 * j),
    )


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    lower = (parts[0] >> (8 * (r % 4) + 4 * (r // 4))) & 15
    return (lower | (((parts[2] >> (r % 4 + 16 * (r // 4))) & 1) << 4)).to(tl.float32)


TYPE = BlockType(
    "Q5_1",
    Layout(weights=32, size_bytes=24, word=torch.int32, segments=1, segment_words=4, groups=1, planes=8),
    Unpacking(load=_load, scales=scales, codes=_codes, columns=columns),
    reference,
)
