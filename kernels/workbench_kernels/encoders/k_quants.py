"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K blocks made of float32 weights, byte for byte what llama.cpp writes.

A block is 256 weights in runs of 16 or 32. Each run gets a scale (and a least weight) by a search (`search.py`),
the runs' scales are quantized themselves, and then every weight is rounded anew to the scales as they are stored. Where
a stored scale came out as 0, the codes of the search stay, though nothing reads them.

All functions take `x`, float32 [run, runs, blocks, rows] (weight, run of the block, block of the row, row), and
`importance`, float32 [run, runs, blocks, 1] or None, and return uint8 [rows x blocks, bytes of a block]; the layouts
stand in the docstrings of `q2_k.py` to `q6_k.py`. With importances a weight w counts importance x sqrt(s + w^2), with s
the mean square of its block (twice that but for Q2_K); in Q6_K the importance alone. Without: |w| in Q2_K, w^2 in Q3_K
and Q6_K, root mean square of the run + |w| in Q4_K and Q5_K.

Source: llama.cpp, ggml-quants.c, `quantize_row_q*_K_ref` (without importances) and `quantize_row_q*_K_impl`.
"""

import torch

from workbench_kernels.encoders.search import (
    EPSILON,
    descended,
    first_largest,
    inverse,
    nearest,
    number,
    offset,
    positive,
    signed,
    total,
)


def q2_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    if importance is None:
        codes, scales, leasts = offset(x, x.abs(), 3, -0.5, 0.1, 15, absolute=True)
        scale_codes, d = _shares(scales, 15.0)
        least_codes, dmin = _shares(leasts, 15.0)
    else:
        weights = _weights(x, importance, 1.0)
        codes, scales, leasts = offset(x, weights, 3, -0.9, 0.05, 36)
        shares = total(weights)
        scale_codes, d = positive(scales, shares, 15)
        least_codes, dmin = positive(leasts, shares, 15)
    packed = (scale_codes | (least_codes << 4)) & 255
    d, dmin = d.half(), dmin.half()
    codes = _again(x, codes, d.float() * (packed & 15), dmin.float() * (packed >> 4), 0, 3)
    return _joined(_blocks(packed), _quarters(_blocks(codes)), _half(d), _half(dmin))


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
    by_run = _blocks(stored)
    low, high = by_run & 15, by_run >> 4
    scale_bytes = [low[:, :8] | (low[:, 8:] << 4), _quarters_of(high.view(-1, 4, 4))]
    in_order = _blocks(codes)
    upper = in_order.view(-1, 8, 32) >> 2
    bits = sum((upper[:, i] << i for i in range(1, 8)), upper[:, 0])
    return _joined(bits, _quarters(in_order & 3), *scale_bytes, _half(d))


def q4_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    header, codes = _runs_of_32(x, importance, 15, -1.0, 20)
    return _joined(*header, _halves(codes))


def q5_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    header, codes = _runs_of_32(x, importance, 31, -0.5, 15)
    upper = codes.view(-1, 8, 32) >> 4
    bits = sum((upper[:, i] << i for i in range(1, 8)), upper[:, 0])
    return _joined(*header, bits, _halves(codes & 15))


def q6_k(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    codes, scales = signed(x, x * x if importance is None else importance.expand_as(x), 32)
    largest = first_largest(scales)
    empty = largest.abs() < EPSILON
    grid = number(-128.0, x) / largest
    d = (1.0 / grid).masked_fill_(empty, 0.0).half()
    stored = nearest(scales * grid).clamp_(max=127).masked_fill_(empty, 0)
    codes = _again(x, codes, d.float() * stored, None, -32, 31).masked_fill_(empty, 0)
    halves = _blocks(codes).view(-1, 2, 4, 32)
    low = halves & 15
    lower = torch.cat([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], dim=2)
    upper = _quarters_of(halves >> 4)
    return _joined(lower, upper, _blocks(stored & 255), _half(d))


def _runs_of_32(
    x: torch.Tensor, importance: torch.Tensor | None, levels: int, start: float, steps: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What Q4_K and Q5_K share: the 16 bytes before the codes, and the codes in order, int32 [n, 256]."""
    if importance is None:
        size = _root(total(x * x) / number(32.0, x))
        codes, scales, leasts = offset(x, size + x.abs(), levels, start, 0.1, steps)
        scale_codes, d = _shares(scales, 63.0)
        least_codes, dmin = _shares(leasts, 63.0)
    else:
        weights = _weights(x, importance, 2.0)
        codes, scales, leasts = offset(x, weights, levels, -0.9, 0.05, 36)
        shares = total(weights)
        scale_codes, d = positive(scales, shares, 63)
        least_codes, dmin = positive(leasts, shares, 63)
    if importance is None or levels == 31:
        # Not so in llama.cpp's Q4_K with importances: a code beyond 6 bits, as a scale below zero gets, spills over.
        scale_codes, least_codes = scale_codes.clamp_(max=63), least_codes.clamp_(max=63)
    first = (scale_codes[:4] | (scale_codes[4:] >> 4 << 6)) & 255
    second = (least_codes[:4] | (least_codes[4:] >> 4 << 6)) & 255
    third = (scale_codes[4:] & 15) | ((least_codes[4:] & 15) << 4)
    d, dmin = d.half(), dmin.half()
    scale = d.float() * torch.cat([first & 63, (third & 15) | (first >> 6 << 4)])
    least = dmin.float() * torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)])
    codes = _again(x, codes, scale, least, 0, levels)
    header = [_half(d), _half(dmin), _blocks(first), _blocks(second), _blocks(third)]
    return header, _blocks(codes)


def _weights(x: torch.Tensor, importance: torch.Tensor, times: float) -> torch.Tensor:
    """importance x sqrt(times x mean square of the block + w^2)."""
    squares = x * x
    in_order = squares.transpose(0, 1).reshape(-1, *x.shape[2:])
    # Both are powers of two, so the product is the quotient.
    spread = total(in_order.unbind(0)) * (times / 256)
    return importance * _root(squares.add_(spread))


def _root(value: torch.Tensor) -> torch.Tensor:
    """Through float64: torch's in float32 is not the nearest number everywhere."""
    return value.double().sqrt_().float()


def _shares(scales: torch.Tensor, levels: float) -> tuple[torch.Tensor, torch.Tensor]:
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


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[run, runs, blocks, rows] or [runs, blocks, rows] -> [rows x blocks, weights or runs], in the file's order."""
    parts = values.permute(*reversed(range(values.ndim)))
    return parts.reshape(parts.shape[0] * parts.shape[1], -1)


def _quarters_of(values: torch.Tensor) -> torch.Tensor:
    """[..., 4, n] of two bits each -> [..., n], the first in the lowest bits."""
    return values[..., 0, :] | (values[..., 1, :] << 2) | (values[..., 2, :] << 4) | (values[..., 3, :] << 6)


def _quarters(codes: torch.Tensor) -> torch.Tensor:
    """Codes of two bits [n, 256] -> bytes [n, 2, 32]."""
    return _quarters_of(codes.view(-1, 2, 4, 32))


def _halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits [n, 256] -> bytes [n, 4, 32]."""
    pairs = codes.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)


def _half(value: torch.Tensor) -> torch.Tensor:
    """float16 [blocks, rows] -> two bytes each, uint8 [rows x blocks, 2]."""
    return value.t().flatten().view(torch.uint8).view(-1, 2)


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.to(torch.uint8).flatten(1) for part in parts], dim=1)
