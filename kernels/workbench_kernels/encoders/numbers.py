"""The numbers that blocks hold, taken out of their bytes and put back: for encoders that improve on blocks given.

In every type here a weight is

    w = d x scale x level(code) - dmin x least

with `d` and `dmin` of the block, float16, and whole numbers `scale` and `least` of a run of 16 or 32 weights. Where a
block is one run its scale is 1, and its least weight -1 x the number stored; types without least weights have a `dmin`
of 0. A level is a code less a constant, or in IQ4_NL and IQ4_XS a table's. The layouts stand in the docstrings of
`gguf/*.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from workbench_kernels.encoders.packing import bits, halves, joined, quarters
from workbench_kernels.gguf import layout
from workbench_kernels.gguf.iq4_nl import LEVELS
from workbench_kernels.gguf.layout import cut


@dataclass(frozen=True)
class Scales:
    """Of n blocks: `d` and `dmin` float32 [n, 1], exact in float16; `scale` and `least` float32 [n, runs], whole."""

    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    least: torch.Tensor


@dataclass(frozen=True)
class Numbers:
    """How a type's numbers lie in a block."""

    run: int
    """Weights that share a scale."""
    codes: int
    """How many there are."""
    scales: Callable[[torch.Tensor], Scales]
    """Out of blocks uint8 [n, bytes]."""
    pack: Callable[[Scales, torch.Tensor], torch.Tensor]
    """The blocks of scales and codes, int32 [n, weights]."""
    inner: tuple[int, int] = (1, 1)
    """The least and the largest scale of a run."""
    shifted: bool = False
    """Whether there are least weights."""
    less: int = 0
    """What is taken from a code; of no use where there is a table."""
    table: tuple[int, ...] = ()
    """Levels in ascending order, by code."""


# --- scales out of blocks -----------------------------------------------------------------------


def _alone(blocks: torch.Tensor) -> Scales:
    """Of blocks that are one run and begin with d."""
    d = layout.halves(blocks[:, :2])
    return _signed(d, torch.ones_like(d))


def _with_least(blocks: torch.Tensor) -> Scales:
    d, m = layout.halves(blocks[:, :4]).chunk(2, dim=1)
    return Scales(d, -m, torch.ones_like(d), torch.ones_like(d))


def _of_16_by_4_bits(blocks: torch.Tensor) -> Scales:
    d, dmin = layout.halves(blocks[:, 80:84]).chunk(2, dim=1)
    return Scales(d, dmin, (blocks[:, :16] & 15).float(), (blocks[:, :16] >> 4).float())


def _of_16_by_6_bits(blocks: torch.Tensor) -> Scales:
    codes = cut(blocks[:, 96:104], 4).reshape(-1, 16) | (cut(blocks[:, 104:108], 2).reshape(-1, 16) << 4)
    return _signed(layout.halves(blocks[:, 108:110]), codes.float() - 32)


def _of_16_by_8_bits(blocks: torch.Tensor) -> Scales:
    return _signed(layout.halves(blocks[:, 208:210]), blocks[:, 192:208].contiguous().view(torch.int8).float())


def _of_8_by_6_bits(blocks: torch.Tensor) -> Scales:
    lower = cut(blocks[:, 4:8], 4).transpose(1, 2).reshape(-1, 8)
    upper = cut(blocks[:, 2:4], 2).transpose(1, 2).reshape(-1, 8)
    return _signed(layout.halves(blocks[:, :2]), (lower | (upper << 4)).float() - 32)


def _of_8_pairs(blocks: torch.Tensor) -> Scales:
    d, dmin = layout.halves(blocks[:, :4]).chunk(2, dim=1)
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    least = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1)
    return Scales(d, dmin, scale.float(), least.float())


def _signed(d: torch.Tensor, scale: torch.Tensor) -> Scales:
    return Scales(d, torch.zeros_like(d), scale, torch.zeros_like(scale))


# --- and back -----------------------------------------------------------------------------------


def _half(value: torch.Tensor) -> torch.Tensor:
    """float32 [n, 1] -> uint8 [n, 2]."""
    return value.half().flatten().view(torch.uint8).view(-1, 2)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    return quarters(codes.view(-1, 2, 4, 32))


def _upper_bits(codes: torch.Tensor) -> torch.Tensor:
    return bits((codes >> 4).view(-1, 4, 8).transpose(1, 2))


def _pairs(s: Scales) -> torch.Tensor:
    scale, least = s.scale.int(), s.least.int()
    first, second = scale[:, :4] | (scale[:, 4:] >> 4 << 6), least[:, :4] | (least[:, 4:] >> 4 << 6)
    return joined(_half(s.d), _half(s.dmin), first, second, (scale[:, 4:] & 15) | ((least[:, 4:] & 15) << 4))


def _q3_k(s: Scales, codes: torch.Tensor) -> torch.Tensor:
    stored = s.scale.int() + 32
    scales = halves(stored, 8), quarters((stored >> 4).view(-1, 4, 4))
    return joined(bits(codes.view(-1, 8, 32) >> 2), _quarters(codes & 3), *scales, _half(s.d))


def _q2_k(s: Scales, codes: torch.Tensor) -> torch.Tensor:
    return joined(s.scale.int() | (s.least.int() << 4), _quarters(codes), _half(s.d), _half(s.dmin))


def _q5_k(s: Scales, codes: torch.Tensor) -> torch.Tensor:
    return joined(_pairs(s), bits(codes.view(-1, 8, 32) >> 4), halves(codes, 32))


def _q6_k(s: Scales, codes: torch.Tensor) -> torch.Tensor:
    return joined(halves(codes, 64), _quarters(codes >> 4), s.scale.int() & 255, _half(s.d))


def _iq4_xs(s: Scales, codes: torch.Tensor) -> torch.Tensor:
    stored = s.scale.int() + 32
    upper = quarters((stored >> 4).view(-1, 2, 4).transpose(1, 2))
    return joined(_half(s.d), upper, halves(stored, 1), halves(codes, 16))


_4 = Numbers(32, 16, _alone, lambda s, codes: joined(_half(s.d), halves(codes, 16)))

NUMBERS = {
    "Q8_0": Numbers(
        32,
        256,
        _alone,
        lambda s, codes: joined(_half(s.d), (codes - 128) & 255),
        less=128,
    ),
    "Q6_K": Numbers(16, 64, _of_16_by_8_bits, _q6_k, inner=(-128, 127), less=32),
    "Q5_K": Numbers(32, 32, _of_8_pairs, _q5_k, inner=(0, 63), shifted=True),
    "Q5_1": Numbers(
        32,
        32,
        _with_least,
        lambda s, codes: joined(_half(s.d), _half(-s.dmin), _upper_bits(codes), halves(codes, 16)),
        shifted=True,
    ),
    "Q5_0": Numbers(
        32,
        32,
        _alone,
        lambda s, codes: joined(_half(s.d), _upper_bits(codes), halves(codes, 16)),
        less=16,
    ),
    "Q4_K": Numbers(
        32, 16, _of_8_pairs, lambda s, codes: joined(_pairs(s), halves(codes, 32)), inner=(0, 63), shifted=True
    ),
    "Q4_1": Numbers(
        32,
        16,
        _with_least,
        lambda s, codes: joined(_half(s.d), _half(-s.dmin), halves(codes, 16)),
        shifted=True,
    ),
    "Q4_0": replace(_4, less=8),
    "Q3_K": Numbers(16, 8, _of_16_by_6_bits, _q3_k, inner=(-32, 31), less=4),
    "Q2_K": Numbers(16, 4, _of_16_by_4_bits, _q2_k, inner=(0, 15), shifted=True),
    "IQ4_XS": Numbers(32, 16, _of_8_by_6_bits, _iq4_xs, inner=(-32, 31), table=LEVELS),
    "IQ4_NL": replace(_4, table=LEVELS),
}
"""By llama.cpp's name of the type."""
