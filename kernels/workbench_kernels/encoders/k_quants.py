"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K blocks made of float32 weights, byte for byte what llama.cpp writes.

A block is 256 weights in runs of 16 or 32. Each run gets a scale (and a least weight) by a search (`search.py`), the
runs' scales are quantized themselves, and then every weight is rounded anew to the scales as they are stored. Where a
stored scale came out as 0, the codes of the search stay, though nothing reads them.

All functions take `x`, float32 [run, runs, blocks, rows] (weight, run of the block, block of the row, row), and
`importance`, float32 [run, runs, blocks, 1] or None, and return uint8 [rows x blocks, bytes of a block]; the layouts
stand in the docstrings of `q2_k.py` to `q6_k.py`. With importances a weight w counts importance x sqrt(s + w^2), with s
the mean square of its block (twice that but for Q2_K); in Q6_K the importance alone. Without: |w| in Q2_K, w^2 in Q3_K
and Q6_K, root mean square of the run + |w| in Q4_K and Q5_K.

Source: llama.cpp, ggml-quants.c, `quantize_row_q*_K_ref` (without importances) and `quantize_row_q*_K_impl`.
"""

import torch

from workbench_kernels.encoders.packing import bits, half, halves, in_order, joined, quarters
from workbench_kernels.encoders.search import (
    EPSILON,
    descended,
    first_largest,
    inverse,
    nearest,
    number,
    offset,
    positive,
    root,
    signed,
    total,
)


def q2_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    plain = importance is None
    weights = x.abs() if importance is None else _weights(x, importance, 1.0)
    codes, (scale_codes, d), (least_codes, dmin) = _scales_and_leasts(x, weights, plain, 3, -0.5, 15, 15)
    packed = (scale_codes | (least_codes << 4)) & 255
    codes = _again(x, codes, d.float() * (packed & 15), dmin.float() * (packed >> 4), 0, 3)
    return joined(in_order(packed), _quarters(in_order(codes)), half(d), half(dmin))


def q3_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    if importance is None:
        codes, scales = descended(x, 4)
        largest = first_largest(scales)
        grid = number(-32.0, x) / largest
        stored = nearest(scales * grid).clamp_(-32, 31).add_(32).masked_fill_(largest == 0, 0)
        d = torch.where(largest == 0, 0.0, 1.0 / grid)
    else:
        weights = _weights(x, importance, 2.0)
        codes, scales = signed(x, weights, 4)
        stored, d = signed(scales, total(weights), 32)
    d = d.half()
    codes = _again(x, codes, d.float() * (stored - 32), None, -4, 3)
    by_run, codes = in_order(stored), in_order(codes)
    upper = bits(codes.view(-1, 8, 32) >> 2)
    scale_bytes = halves(by_run, 8), quarters((by_run >> 4).view(-1, 4, 4))
    return joined(upper, _quarters(codes & 3), *scale_bytes, half(d))


def q4_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    header, codes = _runs_of_32(x, importance, 15, -1.0, 20)
    return joined(*header, halves(codes, 32))


def q5_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    header, codes = _runs_of_32(x, importance, 31, -0.5, 15)
    return joined(*header, bits(codes.view(-1, 8, 32) >> 4), halves(codes, 32))


def q6_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    codes, scales = signed(x, x * x if importance is None else importance.expand_as(x), 32)
    largest = first_largest(scales)
    empty = largest.abs() < EPSILON
    grid = number(-128.0, x) / largest
    d = (1.0 / grid).masked_fill_(empty, 0.0).half()
    stored = nearest(scales * grid).clamp_(max=127).masked_fill_(empty, 0)
    codes = _again(x, codes, d.float() * stored, None, -32, 31).masked_fill_(empty, 0)
    codes = in_order(codes)
    return joined(halves(codes, 64), _quarters(codes >> 4), in_order(stored & 255), half(d))


def _runs_of_32(
    x: torch.Tensor, importance: torch.Tensor | None, levels: int, start: float, steps: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What Q4_K and Q5_K share: the 16 bytes before the codes, and the codes in order, int32 [n, 256]."""
    plain = importance is None
    weights = root(total(x * x) / number(32.0, x)) + x.abs() if importance is None else _weights(x, importance, 2.0)
    codes, (scale_codes, d), (least_codes, dmin) = _scales_and_leasts(x, weights, plain, levels, start, steps, 63)
    if plain or levels == 31:
        # Not so in llama.cpp's Q4_K with importances: a code beyond 6 bits, as a scale below zero gets, spills over.
        scale_codes, least_codes = scale_codes.clamp_(max=63), least_codes.clamp_(max=63)
    first = (scale_codes[:4] | (scale_codes[4:] >> 4 << 6)) & 255
    second = (least_codes[:4] | (least_codes[4:] >> 4 << 6)) & 255
    third = (scale_codes[4:] & 15) | ((least_codes[4:] & 15) << 4)
    scale = d.float() * torch.cat([first & 63, (third & 15) | (first >> 6 << 4)])
    least = dmin.float() * torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)])
    codes = _again(x, codes, scale, least, 0, levels)
    header = [half(d), half(dmin), in_order(first), in_order(second), in_order(third)]
    return header, in_order(codes)


def _scales_and_leasts(
    x: torch.Tensor, weights: torch.Tensor, plain: bool, levels: int, start: float, steps: int, top: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Codes as in `offset`; and of the runs' scales, then of their leasts, the codes up to `top` and the unit, float16.

    `plain`: without importances. `start`, `steps`: the grids that are searched then; with importances they are fixed.
    """
    grids = (start, 0.1, steps) if plain else (-0.9, 0.05, 36)
    # Of Q2_K without importances llama.cpp weighs the sizes of errors, not their squares.
    codes, scales, leasts = offset(x, weights, levels, *grids, absolute=plain and levels == 3)
    if plain:
        (scale_codes, d), (least_codes, dmin) = _shares(scales, top), _shares(leasts, top)
    else:
        shares = total(weights)
        (scale_codes, d), (least_codes, dmin) = positive(scales, shares, top), positive(leasts, shares, top)
    return codes, (scale_codes, d.half()), (least_codes, dmin.half())


def _weights(x: torch.Tensor, importance: torch.Tensor, times: float) -> torch.Tensor:
    """importance x sqrt(times x mean square of the block + w^2)."""
    squares = x * x
    of_block = squares.transpose(0, 1).reshape(-1, *x.shape[2:])
    # Both are powers of two, so the product is the quotient.
    spread = total(of_block.unbind(0)) * (times / 256)
    return importance * root(squares.add_(spread))


def _shares(scales: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [runs, ...] as whole shares of the largest, int32 of a byte, and the unit [...]. A search may give a scale
    below zero, which becomes the byte that it is in llama.cpp."""
    high = scales.amax(0).clamp_(min=0).add_(0.0)
    codes = nearest(scales * inverse(levels, high)) & 255
    return codes, high / number(levels, scales)


def _again(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, least: torch.Tensor | None, low: int, high: int
) -> torch.Tensor:
    """Codes of all weights for scales [runs, ...] as they are stored; where a scale is 0 the ones given."""
    new = nearest((x if least is None else x + least) / scale).clamp_(low, high).sub_(low)
    return torch.where(scale == 0, codes, new)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """Codes of two bits [n, 256] -> bytes [n, 2, 32]."""
    return quarters(codes.view(-1, 2, 4, 32))
