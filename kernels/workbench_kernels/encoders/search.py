"""The searches that llama.cpp's quantizers are made of: which codes and scale fit a run of weights best.

Tensors are [n, ...]: weight i of every run of the tensor is one plane, so that a step over all runs is one
operation over contiguous memory, and a sum is n additions of planes. To the last bit the arithmetic is llama.cpp's:

- float32 throughout, every product rounded before it is added. llama.cpp builds its quantizers for any x86-64, which
  has no fused multiply-add. (A build for ARM fuses, and differs from this and from x86 in rare last bits.) Torch's
  operators, one after the other, round the same way, on a GPU too; so does CUDA C++ whose compiler is told not to
  fuse, which is a hundred times as fast there (`k_quants.cu`: the same operations, and to be changed with these).
  Rejected: torch.compile and Triton, whose compilers fuse;
- sums in the order of the weights, one weight at a time (`total`): a parallel sum rounds otherwise;
- `nearest`'s wrong answers beyond 22 bits are part of the format's history, and are kept;
- what was divided by nothing is put right afterwards, as a branch there is a choice between two planes here.

A quotient has a tensor on both sides: by a number, torch multiplies with its inverse on a GPU; and a number by a tensor
it makes of the tensor's inverse. Source: llama.cpp, ggml-quants.c: `make_qx_quants` (`signed`), `make_qkx2_quants` and
`make_qkx3_quants` (`offset`; they differ in nothing that matters here), `make_qp_quants` (`positive`),
`make_q3_quants` (`descended`), `nearest_int`.
"""

from collections.abc import Iterable

import torch

EPSILON = 1e-15
"""A run whose weights are all smaller is zero (`GROUP_MAX_EPS`)."""

MAGIC = 1.5 * 2**23
"""Added to a float32 it leaves the nearest whole number in the last bits, halves to even."""


def number(value: float, like: torch.Tensor) -> torch.Tensor:
    """A float32 of no dimension on the device of `like`."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def single(step: float, count: int, start: float = 0.0) -> float:
    """start + step x count as float32 arithmetic has it."""
    one = torch.float32
    return float(torch.tensor(start, dtype=one) + torch.tensor(step, dtype=one) * count)


def total(planes: Iterable[torch.Tensor], start: float = 0.0) -> torch.Tensor:
    """Their sum, from the first to the last. A start of -0.0 is the sum that begins with the first itself."""
    first, *others = planes
    found = first + start
    for plane in others:
        found += plane
    return found


def nearest(value: torch.Tensor) -> torch.Tensor:
    """float32 -> int32 as `nearest_int` gives it, also where that is not the nearest: beyond 2^22 and for infinity.
    Consumes its argument. NaN is the caller's to avoid: its bits depend on the processor."""
    return value.add_(MAGIC).view(torch.int32).bitwise_and_(0x7FFFFF).sub_(0x400000)


def inverse(levels: float, size: torch.Tensor) -> torch.Tensor:
    """levels / size; 0 where that is infinite. There llama.cpp's products are infinite or NaN, which its `nearest_int`
    and what follows make a zero of."""
    found = number(levels, size) / size
    return found.masked_fill_(found.isinf(), 0.0)


def root(value: torch.Tensor) -> torch.Tensor:
    """The square root, through float64: torch's in float32 is not the nearest number everywhere."""
    return value.double().sqrt_().float()


def first_largest(x: torch.Tensor) -> torch.Tensor:
    """The weight [...] of the largest size in [n, ...], the first of several; +0 where there are only zeros."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0] + 0.0


def signed(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ scale x (code - levels), the best of 19 scales by the weighted square error.

    x, weights: float32 [n, ...]. Returns codes 0 to 2 levels - 1, int32 [n, ...], and scales, float32 [...]. A run of
    zeros has codes 0 and scale 0.
    """
    largest = first_largest(x)
    empty = largest.abs() < EPSILON
    weighted = weights * x

    def fit(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        reach = number(-single(0.1, step, levels), x) / largest
        codes = (x * reach).round_().clamp_(-levels, levels - 1)
        products = total(weighted * codes)
        return codes, products, total((weights * codes).mul_(codes))

    codes, products, norms = fit(0)
    scale = torch.where(norms == 0, 0.0, products / norms)
    best = scale * products
    for step in (*range(-9, 0), *range(1, 10)):
        trial, products, norms = fit(step)
        better = (norms > 0) & (products * products > best * norms)
        codes = torch.where(better, trial, codes)
        scale = torch.where(better, products / norms, scale)
        best = torch.where(better, scale * products, best)
    codes = codes.add_(levels).masked_fill_(empty, 0).to(torch.int32)
    return codes, scale.masked_fill_(empty, 0.0)


def descended(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ scale x (code - levels), by five rounds over the codes, each moved if that lowers the error weighted by x^2.

    x: float32 [n, ...]. Returns codes, int32 [n, ...], and scales, float32 [...]; codes 0 and scale 0 for zeros.
    """
    largest = first_largest(x)
    empty = largest.abs() < EPSILON
    codes = (x * (number(-levels, x) / largest)).round_().clamp_(-levels, levels - 1)
    codes, scale = _rounds(x, x * x, codes, -levels, levels - 1)
    codes = codes.add_(levels).masked_fill_(empty, 0).to(torch.int32)
    return codes, scale.masked_fill_(empty, 0.0)


def offset(
    x: torch.Tensor, weights: torch.Tensor, levels: int, start: float, step: float, steps: int, absolute: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ~ scale x code - least, least >= 0: for each of several grids the codes, then the line through them.

    x, weights: float32 [n, ...]; the grids put levels + start + i x step, i = 0 to `steps`, into the range of the
    weights. The error is the weighted square, or the weighted size if `absolute`. Returns codes 0 to `levels`, int32
    [n, ...], scales and leasts, float32 [...].
    """
    low, high = x.gather(0, x.argmin(0, keepdim=True))[0], x.amax(0)
    low = torch.where(low > 0, 0.0, low)
    flat, floor = high == low, low
    sum_w, sum_x = total(weights), total(weights * x, -0.0)

    def codes_of(grid: torch.Tensor) -> torch.Tensor:
        return nearest((x - low).mul_(grid)).clamp_(0, levels).float()

    def error_of(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        away = (codes * scale).add_(low).sub_(x)
        away = away.abs_() if absolute else away.mul_(away)
        return total(away.mul_(weights))

    grid = number(levels, x) / (high - low)
    scale = 1.0 / grid
    codes = codes_of(grid.masked_fill_(grid.isinf(), 0.0))
    error = error_of(codes, scale, low)
    for i in range(steps + 1):
        trial = codes_of(inverse(single(step, i, start) + levels, high - low))
        terms = weights * trial
        sum_l, sum_xl = total(terms), total(terms * x)
        sum_l2 = total(terms.mul_(trial))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_low = torch.where(above, 0.0, new_low)
        new_scale = torch.where(above, sum_xl / sum_l2, new_scale)
        new_error = error_of(trial, new_scale, new_low)
        better = (determinant > 0) & (new_error < error)
        codes = torch.where(better, trial, codes)
        error = torch.where(better, new_error, error)
        scale = torch.where(better, new_scale, scale)
        low = torch.where(better, new_low, low)
    codes = codes.masked_fill_(flat, 0).to(torch.int32)
    return codes, scale.masked_fill_(flat, 0.0), -torch.where(flat, floor, low)


def positive(x: torch.Tensor, weights: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x ~ scale x code for the scales of a block: the best of nine grids, then five rounds as in `descended`.

    x, weights: float32 [n, ...]. Returns codes, int32 [n, ...] of a byte (for an x below zero, which a search may give,
    the byte that llama.cpp's code becomes), and scales, float32 [...].
    """
    high = x.amax(0).clamp_(min=0)
    empty = high < EPSILON

    def error_of(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        away = x - scale * codes
        return total((weights * away).mul_(away))

    grid = inverse(levels, high)
    error = error_of((nearest(x * grid) & 255).float(), 1.0 / grid)
    for step in (*range(-4, 0), *range(1, 5)):
        new_grid = inverse(single(0.1, step) + levels, high)
        new_error = error_of(nearest(x * new_grid).clamp_(max=levels).float(), 1.0 / new_grid)
        better = new_error < error
        grid = torch.where(better, new_grid, grid)
        error = torch.where(better, new_error, error)
    codes, scale = _rounds(x, weights, nearest(x * grid).clamp_(max=levels).float(), None, levels)
    return codes.to(torch.int32).masked_fill_(empty, 0), scale.masked_fill_(empty, 0.0)


def _rounds(
    x: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, low: int | None, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Five rounds over the codes, each moved if the best scale for all of them then leaves a smaller error.

    x, weights, codes: float32 [n, ...]. Codes are from `low` to `high`; without a `low` they are kept as bytes. Returns
    codes, float32 [n, ...], and the best scales for them, float32 [...], 0 where there is none.
    """
    weighted = weights * x
    products, norms = total(weighted * codes), total((weights * codes).mul_(codes))
    codes = codes if low is not None else (codes.to(torch.int32) & 255).float()
    for _ in range(5):
        for i in range(x.shape[0]):
            code = codes[i]
            less = products - weighted[i] * code
            norm_less = norms - weights[i] * code * code
            whole = nearest(x[i] * norm_less / less).clamp_(low, high)
            moved = whole.float()
            more = less + weighted[i] * moved
            norm_more = norm_less + weights[i] * moved * moved
            better = (less > 0) & (moved != code) & ((norm_less if low is None else norm_more) > 0)
            better &= more * more * norms > products * products * norm_more
            codes[i] = torch.where(better, moved if low is not None else (whole & 255).float(), code)
            products = torch.where(better, more, products)
            norms = torch.where(better, norm_more, norms)
    return codes, torch.where(norms > 0, products / norms, 0.0)
