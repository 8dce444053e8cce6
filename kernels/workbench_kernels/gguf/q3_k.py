"""Q3_K: 256 weights in 110 bytes (3.4375 bits a weight) as 16 runs of 16, w = d x (scale - 32) x (q - 4).

In each half h of the block (128 weights), with v = 0..3 counting its quarters and b = 0..31 inside one:

    bytes 0-31     upper bit of q: bit 4h + v of byte b
    bytes 32-95    lower 2 bits of q: bits 2v, 2v + 1 of byte 32 + 32h + b
    bytes 96-107   scale, 6 bits a run; weight 128h + 32v + b is in run 8h + 2v + b // 16. Lower 4 bits: low halves of
                   bytes 96-103 for runs 0-7, high halves for runs 8-15; upper 2 bits: bits 2 (run // 4) and the
                   next of byte 104 + run % 4
    bytes 108-109  d, float16

Read in 16-bit words (110 is no multiple of 4), 55 a block. A segment is (h, b // 16): eight words.
Source of the layout: llama.cpp, ggml-common.h, `block_q3_K`, and `dequantize_row_q3_K`.
"""

import torch

from workbench_kernels.backend import jit, tl
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.blocks import half_of


def reference(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 110] -> float32 [n, 256]."""
    d = data[:, 108:].contiguous().view(torch.float16).float()
    lower = torch.cat([data[:, 96:104] & 15, data[:, 96:104] >> 4], dim=1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    upper = ((data[:, None, 104:108] >> shifts[:, None]) & 3).reshape(-1, 16)
    scale = d * ((lower | (upper << 4)).float() - 32)
    low = (data[:, 32:96].reshape(-1, 2, 1, 32) >> shifts[:, None]) & 3
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    high = ((data[:, None, :32] >> bits[:, None]) & 1).view(-1, 2, 4, 32)
    codes = (low | (high << 2)).view(-1, 16, 16).float() - 4
    return (scale[:, :, None] * codes).view(-1, 256)


@jit
def _load(row, s, j, inside):
    block, h, i = row + (s // 4) * 55, (s // 2) % 2, s % 2
    wide = inside[:, :, None]
    return (
        tl.load((block + 16 + 16 * h + 8 * i)[:, :, None] + j, mask=wide, other=0).to(tl.int32),
        tl.load((block + 8 * i)[:, :, None] + j, mask=wide, other=0).to(tl.int32),
        tl.load(block + 54, mask=inside, other=0),
        # Bytes 96-103, runs 8h + 0..7 in one of their halves, and bytes 104-107.
        tl.load(block + 48, mask=inside, other=0).to(tl.int32),
        tl.load(block + 49, mask=inside, other=0).to(tl.int32),
        tl.load(block + 50, mask=inside, other=0).to(tl.int32),
        tl.load(block + 51, mask=inside, other=0).to(tl.int32),
        tl.load(block + 52, mask=inside, other=0).to(tl.int32),
        tl.load(block + 53, mask=inside, other=0).to(tl.int32),
    )


@jit
def _scales(parts, s, g: tl.constexpr):
    # Run 8h + 2g + i: byte 2g + i of the eight, half h; upper bits 2 (2h + g // 2) of byte (2g + i) % 4.
    h, i = (s // 2) % 2, s % 2
    lower = (parts[3 + g] >> (8 * i + 4 * h)) & 15
    upper = (parts[7 + g % 2] >> (8 * i + 4 * h + 2 * (g // 2))) & 3
    scale = half_of(parts[2]) * ((lower | (upper << 4)) - 32).to(tl.float32)
    return scale, -4.0 * scale


@jit
def _codes(parts, s, g: tl.constexpr, r: tl.constexpr):
    lower = (parts[0] >> (8 * r + 2 * g)) & 3
    upper = (parts[1] >> (8 * r + 4 * ((s // 2) % 2) + g)) & 1
    return (lower | (upper << 2)).to(tl.float32)


@jit
def _columns(s, j, g: tl.constexpr, r: tl.constexpr):
    return 128 * (s // 2) + 32 * g + 16 * (s % 2) + 2 * j + r


TYPE = blocks.BlockType(
    name="Q3_K", weights=256, bytes=110, word=torch.int16, segments=4, segment_words=8, groups=4, planes=2,
    load=_load, scales=_scales, codes=_codes, columns=_columns, reference=reference,
)  # fmt: skip


def dequantize(data: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto") -> torch.Tensor:
    """uint8 [out, in / 256 x 110] -> [out, in]."""
    return blocks.dequantize(TYPE, data, dtype, path=path, name="Q3_K blocks")


def matmul(x: torch.Tensor, data: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out] for W as uint8 [out, in / 256 x 110]; see `blocks.matmul`."""
    return blocks.matmul(TYPE, x, data, path=path, name="Q3_K blocks")
