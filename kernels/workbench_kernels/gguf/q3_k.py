"""Q3_K: 256 weights in 110 bytes (3.4375 bits a weight) as 16 runs of 16, w = d x (scale - 32) x (q - 4).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-31     upper bit of q: bit 4h + v of byte b
    bytes 32-95    lower 2 bits of q: bits 2v, 2v + 1 of byte 32 + 32h + b
    bytes 96-107   scale, 6 bits a run; weight 128h + 32v + b is in run 8h + 2v + b // 16. Lower 4 bits: low halves of
                   bytes 96-103 for runs 0-7, high halves for runs 8-15; upper 2 bits: bits 2 (run // 4) and the
                   next of byte 104 + run % 4
    bytes 108-109  d, float16

Planes: lower bits, upper bits, scales, d. A segment is (h, b // 16): four words of lower and four of upper bits.
Source of the layout: llama.cpp, ggml-common.h, `block_q3_K`, and `dequantize_row_q3_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf.layout import BlockType, Layout, Unpacking, cut, halves
from workbench_kernels.gguf.loads import byte_of, half_of, plane_at, short_at, word_at, words_at
from workbench_kernels.gguf.q2_k import columns


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 110] -> float32 [n, 256]."""
    run_scales = cut(data[:, 96:104], 4).reshape(-1, 16) | (cut(data[:, 104:108], 2).reshape(-1, 16) << 4)
    scale = halves(data[:, 108:]) * (run_scales.float() - 32)
    lower, upper = cut(data[:, 32:96].reshape(-1, 2, 32), 2), cut(data[:, :32], 1).view(-1, 2, 4, 32)
    codes = (lower | (upper << 2)).view(-1, 16, 16).float() - 4
    return (scale[:, :, None] * codes).view(-1, 256)


@jit
def _load(w, count, first, s, j, inside):
    block, h, i = first + s // 4, (s // 2) % 2, s % 2
    scale = plane_at(w, count, 96, 12, block)
    return (
        words_at(plane_at(w, count, 0, 64, block) + 16 * h + 8 * i, j, inside),
        words_at(plane_at(w, count, 64, 32, block) + 8 * i, j, inside),
        short_at(plane_at(w, count, 108, 2, block), inside),
        # Bytes 96-99 and 100-103, runs 8h + 0..7 in one of their halves, and 104-107.
        word_at(scale, 0, inside),
        word_at(scale, 1, inside),
        word_at(scale, 2, inside),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    # Run 8h + 2g + i: byte 2g + i of the eight, half h; upper bits 2 (2h + g // 2) of byte (2g + i) % 4.
    h, byte = (s // 2) % 2, 2 * (g % 2) + s % 2
    lower = (byte_of(parts[3 + g // 2], byte) >> (4 * h)) & 15
    upper = (byte_of(parts[5], byte) >> (4 * h + 2 * (g // 2))) & 3
    scale = half_of(parts[2]) * ((lower | (upper << 4)) - 32).to(tl.float32)
    return scale, tl.zeros_like(scale)


@jit
def _codes(parts, s, g: tl.constexpr, q: tl.constexpr):
    lower, upper = (parts[0] >> (2 * g)) & 0x03030303, (parts[1] >> (4 * ((s // 2) % 2) + g)) & 0x01010101
    return lower | (upper << 2)


TYPE = BlockType(
    "Q3_K",
    Layout(
        weights=256,
        planes=((32, 96), (0, 32), (96, 108), (108, 110)),
        segments=4,
        segment_words=4,
        groups=4,
        quads=1,
        less=4,
    ),
    Unpacking(load=_load, scales=_scales, codes=_codes, columns=columns),
    shifted=False,
    reference=reference,
)
