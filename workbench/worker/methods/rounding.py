"""Rounding a matrix to a grid, to nearest or with error feedback: grids, scale search, column order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workbench.errors import UserError, short
from workbench.worker.kernels import import_kernels
from workbench.worker.layers import Group, Layer
from workbench.worker.methods.feedback import Factor, WholeBlock, factored, feedback

MOST_GROUP = 2**16
"""Columns of a group."""
CHUNK = 1024
"""Output channels in one step of the scale search: with a group of 128 it stays in a core's cache."""
SLAB = 2**26
"""Weights in one step of it on a GPU, which is busy with each operation for longer than asking for it takes; some four
times as many numbers are held beside them."""

NEARLY_ALL = 0.999
"""Part of an error from which what is left beside it is rounding alone."""

TINY_SCALE = 2.0**-14
"""The smallest normal float16. Below it kernels may flush a scale to zero and divide by it."""


def check_grid(method: str, group_size: int, damping: float) -> None:
    """The checks that AWQ's and GPTQ's options share."""
    if group_size != -1 and (not 16 <= group_size <= MOST_GROUP or group_size % 16):
        raise UserError(
            f"{method}: group_size {short(group_size)} cannot be: take a multiple of 16 (32, 64, 128) up to "
            f"{MOST_GROUP}, or -1 for whole rows"
        )
    if not 0 <= damping < 1:
        raise UserError(
            f"{method}: damping {damping} is a fraction of the mean diagonal: take one from 0 to 1, such as 0.01"
        )


# --- shared with AWQ ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Where weights may lie: w = (code - zero) x scale, code in 0 ... levels - 1.

    `scale` (float32, exact in float16) and `zero` (float32 integers) are [groups, out].
    """

    scale: Any
    zero: Any
    bits: int


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [in, out], `error` float32 [out]: each output channel's e G e^T, and the damping it took."""

    codes: Any
    error: Any
    damping: float


def stacked(layer: Layer, group: Group) -> Any:
    """The weights of a group's linear layers side by side, transposed: [in, sum of out], contiguous."""
    import torch

    key = ("stacked", group.linears)
    if key not in layer.shared:
        layer.shared[key] = torch.cat([layer.tensors[f"{name}.weight"] for name in group.linears]).t().contiguous()
    return layer.shared[key]


def row_slices(layer: Layer, group: Group) -> list[tuple[str, slice]]:
    """Where each linear layer of a group lies in `stacked`'s second axis."""
    found, start = [], 0
    for name in group.linears:
        stop = start + layer.tensors[f"{name}.weight"].shape[0]
        found.append((name, slice(start, stop)))
        start = stop
    return found


def output_power(layer: Layer, group: Group) -> Any:
    """w G w^T of each output channel, [sum of out]; computed once for all variants."""
    key = ("power", group.linears)
    if key not in layer.shared:
        layer.shared[key] = quadratic(stacked(layer, group), layer.grams[group.linears[0]])
    return layer.shared[key]


def ratio(part: Any, whole: Any) -> float:
    """A share as a float; 0 where there is nothing to lose."""
    whole = float(whole)
    return max(float(part), 0.0) / whole if whole > 0 else 0.0


def quadratic(columns: Any, gram: Any) -> Any:
    """v^T G v of every column v: [in, n] and [in, in] -> [n]. G is symmetric, so its lower half is not read."""
    import torch

    total = torch.zeros(columns.shape[1], dtype=columns.dtype, device=columns.device)
    step = 256
    for start in range(0, gram.shape[0], step):
        stop = start + step
        here = columns[start:stop]
        side = gram[start:stop, start:stop] @ here
        if stop < gram.shape[0]:
            side.addmm_(gram[start:stop, stop:], columns[stop:], alpha=2.0)
        total += side.mul_(here).sum(0)
    return total


def search_grid(
    weight: Any, gram: Any, size: int, bits: int, *, symmetric: bool, blocks: bool = False, lowest_zero: int = 1
) -> Grid:
    """The scale and zero of every group of `size` inputs, by search over shrunken ranges and a least-squares step.

    `weight` [in, out], `gram` [in, in]. The error minimised is weighted by diag(G), or with `blocks` by G's
    diagonal blocks (what rounding to nearest leaves; error feedback spreads the rest). Groups without any
    weight or any input get scale 1. `lowest_zero` is 1 where the format stores zeros less one.
    """
    import torch

    inputs, outputs = weight.shape
    groups, top = inputs // size, 2**bits - 1
    middle = float(2 ** (bits - 1))
    scale = torch.empty(groups, outputs, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    # With few levels the best range is far inside the largest weight.
    shrinks = [1.0 - 0.08 * i for i in range(-1 if symmetric else 0, 6 if bits > 3 else 9)]
    for some, channels in _steps(groups, size, outputs, weight.device):
        inside = slice(some.start * size, some.stop * size)
        count = () if len(some) == 1 else (len(some),)
        block = None
        if blocks:
            own = gram[inside, inside].view(len(some), size, len(some), size).diagonal(dim1=0, dim2=2)
            block = own.permute(2, 0, 1).reshape(*count, size, size).contiguous()
        importance = gram.diagonal()[inside].view(*count, size)
        rows = slice(some.start, some.stop)
        for here in channels:
            part = weight[inside, here].view(*count, size, -1)
            low, high = part.amin(-2).clamp_(max=0), part.amax(-2).clamp_(min=0)
            best_scale, best_zero = _search(
                part, block, importance, low, high, shrinks, top, middle, symmetric, lowest_zero
            )
            empty = (high - low) <= 0
            scale[rows, here] = torch.where(empty, torch.ones_like(low), best_scale)
            zero[rows, here] = torch.where(empty, torch.full_like(low, middle), best_zero)
    return Grid(scale, zero, bits)


def _steps(groups: int, size: int, outputs: int, device: Any) -> Iterator[tuple[range, list[slice]]]:
    """Groups of inputs that are searched at once, and with them one after the other these output channels: one group
    and some channels on a processor, some groups and all channels on a GPU."""
    at_once, channels = 1, [slice(start, start + CHUNK) for start in range(0, outputs, CHUNK)]
    if device.type != "cpu":
        at_once, channels = max(1, SLAB // (size * outputs)), [slice(None)]
    yield from ((range(first, min(first + at_once, groups)), channels) for first in range(0, groups, at_once))


def _search(
    part: Any,
    block: Any,
    importance: Any,
    low: Any,
    high: Any,
    shrinks: list[float],
    top: int,
    middle: float,
    symmetric: bool,
    lowest_zero: int,
) -> tuple[Any, Any]:
    """The best scale and zero of groups of inputs, [..., out] each: coarse, then finer, then two least-squares steps.

    `part` [..., size, out], `block` [..., size, size] or None, `importance` [..., size], `low` and `high` [..., out].
    """
    import torch

    work, codes = torch.empty_like(part), torch.empty_like(part)
    reach = torch.maximum(-low, high) / middle if symmetric else (high - low) / top
    error, shrink = torch.full_like(low, math.inf), torch.ones_like(low)
    scale, zero = torch.ones_like(low), torch.full_like(low, middle)

    def encode(scale: Any, zero: Any) -> None:
        torch.div(part, scale.unsqueeze(-2), out=work)
        torch.round(work, out=codes)
        if symmetric:
            codes.clamp_(-middle, top - middle)
        else:
            torch.clamp(codes, -zero.unsqueeze(-2), (top - zero).unsqueeze(-2), out=codes)

    def consider(new_scale: Any, new_zero: Any, new_shrink: Any) -> None:
        nonlocal error, shrink, scale, zero
        encode(new_scale, new_zero)
        work.sub_(codes)
        found = (block @ work).mul_(work).sum(-2) if block is not None else _times(importance, work.mul_(work))
        found.mul_(new_scale).mul_(new_scale)
        better = found < error
        error, shrink = torch.where(better, found, error), torch.where(better, new_shrink, shrink)
        scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)

    def shrunk(by: Any) -> None:
        new_scale = as_half(reach * by)
        new_zero = zero if symmetric else (low * -by / new_scale).round_().clamp_(lowest_zero, top)
        consider(new_scale, new_zero, by)

    for factor in shrinks:
        shrunk(torch.full_like(low, factor))
    coarse = shrink
    for step in (0.04, -0.04):
        shrunk(coarse + step)
    for _ in range(2):
        # The best scale for the codes just found; rounding again with it is kept only where it is better.
        encode(scale, zero)
        weighted = block @ codes if block is not None else codes * importance.unsqueeze(-1)
        fitted = (weighted * part).sum(-2) / weighted.mul_(codes).sum(-2)
        consider(as_half(torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)), zero, shrink)
    return scale, zero


def _times(row: Any, matrix: Any) -> Any:
    """A row [..., n] times a matrix [..., n, out] -> [..., out]."""
    return row @ matrix if row.dim() == 1 else (row.unsqueeze(-2) @ matrix).squeeze(-2)


def as_half(scale: Any) -> Any:
    """Rounded to what the checkpoint can store, never below the smallest normal float16."""
    import torch

    return scale.clamp(min=TINY_SCALE, max=65504.0).to(torch.float16).to(torch.float32)


def group_aware_order(diagonal: Any, size: int) -> Any:
    """Groups by their largest entry, entries inside a group by size; [in] -> permutation [in]."""
    import torch

    table = diagonal.view(-1, size)
    inside = torch.argsort(table, dim=1, descending=True, stable=True)
    groups = torch.argsort(table.amax(1), descending=True, stable=True)
    return (inside + torch.arange(table.shape[0], device=table.device)[:, None] * size)[groups].reshape(-1)


def nearest(weight: Any, grid: Grid) -> tuple[Any, Any]:
    """Codes (uint8) of the nearest grid points and the error W - Q, both [in, out]."""
    import torch

    inputs, outputs = weight.shape
    groups = grid.scale.shape[0]
    size, top = inputs // groups, 2**grid.bits - 1
    codes = torch.empty(inputs, outputs, dtype=torch.uint8, device=weight.device)
    error = torch.empty_like(weight)
    for index in range(groups):
        inside = slice(index * size, (index + 1) * size)
        scale, zero = grid.scale[index], grid.zero[index]
        code = torch.div(weight[inside], scale).round_().add_(zero).clamp_(0, top)
        codes[inside] = code.to(torch.uint8)
        torch.sub(weight[inside], code.sub_(zero).mul_(scale), out=error[inside])
    return codes, error


def singular(where: str, damping: float) -> str:
    """The warning that a factorisation needed more damping than was asked for."""
    return f"{where}: the Gram matrix is singular; damping raised to {damping:g}"


def compensate(
    weight: Any,
    gram: Any,
    grid: Grid,
    group_of: Any,
    order: Any,
    damping: float,
    where: str = "a layer",
    factor: Factor | None = None,
) -> Rounded:
    """Round columns in `order`, each taking up the error of those before it (`feedback.py`).

    `weight` [in, out], `gram` [in, in], `group_of` [in]: the grid's row for each input, `order` a permutation, `factor`
    what `factored` makes of gram, order and damping, where that is at hand. Inputs that never fire have no say. Raises
    `UserError` as `factored` does.
    """
    import torch

    top = float(2**grid.bits - 1)
    codes = torch.empty_like(weight)
    rows = group_of[order].tolist()
    last = -1
    scale, zero, inverse = grid.scale[0], grid.zero[0], 1.0 / grid.scale[0]

    def nearest_to(k: int, wanted: Any) -> Any:
        nonlocal last, scale, zero, inverse
        if rows[k] != last:
            last = rows[k]
            scale, zero = grid.scale[last], grid.zero[last]
            inverse = 1.0 / scale
        code = codes[k]
        torch.mul(wanted, inverse, out=code)
        code.add_(zero).round_().clamp_(0.0, top)
        return torch.sub(code, zero).mul_(scale)

    factor = factor or factored(gram, order, damping, where)
    whole_block = None if weight.device.type == "cpu" else by_kernel(factor, grid, rows, codes)
    error, residual = feedback(weight, factor, nearest_to, whole_block)
    back = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    back[order] = codes.to(torch.uint8)
    return Rounded(back, _channel_error(error, residual, factor, gram), factor.damping)


def by_kernel(factor: Factor, grid: Grid, rows: list[int], codes: Any) -> WholeBlock | None:
    """Rounding a block of columns by one launch; None where no kernel runs. `rows`: the grid's row of each column in
    the order; `codes` [in, out] are written."""
    import torch

    import_kernels()
    from workbench_kernels.feedback import round_block, usable

    if not usable(codes.device):
        return None
    groups = torch.tensor(rows, dtype=torch.int32, device=codes.device)
    scale, zero = grid.scale.contiguous(), grid.zero.contiguous()

    def whole_block(here: slice, target: Any, weight: Any, error: Any, residual: Any) -> None:
        own = factor.upper[here, here]
        round_block(target, weight, own, scale, zero, groups[here], 2**grid.bits - 1, codes[here], error, residual)

    return whole_block


def _channel_error(error: Any, residual: Any, factor: Factor, gram: Any) -> Any:
    """e G e^T of each output channel, [out], by `gram` as it was before it was damped."""
    import torch

    channel_error = factor.spread @ residual.mul_(residual)
    if not factor.damping:
        return channel_error
    # The factored matrix was damped; what the damping alone contributed is not error.
    diagonal = gram.diagonal()
    live = diagonal > 0
    share = factor.damping * float(diagonal[live].mean()) if bool(live.any()) else 0.0
    live_error = error[live[factor.order]]
    damped = share * (live_error * live_error).sum(0)
    if float(damped.sum()) < NEARLY_ALL * float(channel_error.sum()):
        return channel_error - damped
    unsorted = torch.empty_like(error)
    unsorted[factor.order] = error
    return quadratic(unsorted, gram)
