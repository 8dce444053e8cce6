"""Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 blocks made of float32 weights, byte for byte what llama.cpp writes.

A block is one run of 32 weights. Without importances its scale is its range over the codes; with them, a search
(`search.py`) over a weight's importance x sqrt(mean square of its row + w^2). Q8_0 ignores importances, as
llama.cpp does.

All functions take `x`, float32 [32, 1, blocks, rows] (weight, 1, block of the row, row), and `importance`, float32
[32, 1, blocks, 1] or None, and return uint8 [rows x blocks, bytes of a block]; the layouts stand in the docstrings of
`q8_0.py` to `q4_0.py`.

Source: llama.cpp, ggml-quants.c, `quantize_row_q*_ref` (without importances) and `quantize_row_q*_impl`.
"""

import torch

from workbench_kernels.encoders.packing import bits, half, halves, in_order, joined
from workbench_kernels.encoders.search import first_largest, number, offset, root, signed, total


def q8_0(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    x = x[:, 0]
    scale = x.abs().amax(0) / number(127.0, x)
    scaled = x * _inverse(scale)
    # Halves away from zero; adding 0.5 first would round 0.49999997 up.
    size = scaled.abs()
    whole = size.floor()
    codes = (whole + (size - whole >= 0.5)).copysign_(scaled).to(torch.int8)
    return joined(half(scale), in_order(codes).view(torch.uint8))


def q4_0(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale, codes = _around_zero(x, importance, 8)
    return joined(half(scale), halves(codes, 16))


def q5_0(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale, codes = _around_zero(x, importance, 16)
    return joined(half(scale), _upper_bits(codes), halves(codes, 16))


def q4_1(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale, low, codes = _from_least(x, importance, 15)
    return joined(half(scale), half(low), halves(codes, 16))


def q5_1(x: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    scale, low, codes = _from_least(x, importance, 31)
    return joined(half(scale), half(low), _upper_bits(codes), halves(codes, 16))


def _around_zero(x: torch.Tensor, importance: torch.Tensor | None, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """w ~ scale x (code - levels): scales [blocks, rows], codes uint8 [n, 32]."""
    if importance is not None:
        codes, scale = signed(x, _weights(x, importance), levels)
        return scale[0], in_order(codes[:, 0].to(torch.uint8))
    x = x[:, 0]
    scale = first_largest(x) / number(-levels, x)
    grid = _inverse(scale)
    # The cast cuts off the fraction.
    codes = (x * grid).add_(levels + 0.5).to(torch.int32).clamp_(max=2 * levels - 1)
    # Of infinite products llama.cpp makes zeros.
    codes = codes.masked_fill_((grid == 0) & (scale != 0), 0)
    return scale, in_order(codes.to(torch.uint8))


def _from_least(
    x: torch.Tensor, importance: torch.Tensor | None, levels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w ~ scale x code + low: scales and lows [blocks, rows], codes uint8 [n, 32]."""
    if importance is not None:
        codes, scale, least = offset(x, _weights(x, importance), levels, -0.9, 0.05, 36)
        return scale[0], -least[0], in_order(codes[:, 0].to(torch.uint8))
    x = x[:, 0]
    low = x.gather(0, x.argmin(0, keepdim=True))[0]
    scale = (x.amax(0) - low) / number(levels, x)
    codes = ((x - low) * _inverse(scale)).add_(0.5).to(torch.int32).clamp_(max=levels)
    return scale, low, in_order(codes.to(torch.uint8))


def _weights(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """importance x sqrt(mean square of the row + w^2)."""
    squares = x * x
    of_row = squares.permute(2, 1, 0, 3).reshape(-1, x.shape[3])
    spread = total(of_row.unbind(0)) / number(of_row.shape[0], x)
    return importance * root(squares.add_(spread))


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale; 0 for 0, and where it is infinite."""
    found = 1.0 / scale
    return found.masked_fill_(found.isinf(), 0.0)


def _upper_bits(codes: torch.Tensor) -> torch.Tensor:
    """The fifth bits of codes [n, 32], in order: bytes [n, 4]."""
    return bits((codes >> 4).view(-1, 4, 8).transpose(1, 2))
