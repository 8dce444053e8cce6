"""Rounding with error feedback (GPTQ's), a block of columns in one launch.

A column of W takes up the errors of all columns before it, so columns are rounded one after the other; output channels
know nothing of one another. What plain operations do in ten launches a column, each longer than its work, is here one
launch a block: a thread has an output channel, and in its registers the channel's errors in the block.
"""

import torch

from workbench_kernels.backend import INTERPRET, jit, tl, triton

COLUMNS = 128
"""Columns of a block, at most: a thread keeps an error of each."""
CHANNELS = 32
"""Output channels of a program: a warp."""


@jit
def _round(
    target,
    weight,
    upper,
    scale,
    zero,
    group,
    codes,
    error,
    residual,
    N,
    across,
    along,
    top,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside, j = n < N, tl.arange(0, COLUMNS)
    errors = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for k in range(COUNT):
        place = k * N + n
        share = tl.load(upper + j * across + k * along, mask=j < k, other=0.0)
        wanted = tl.load(target + place, mask=inside, other=0.0) + tl.sum(errors * share[:, None], 0)
        row = tl.load(group + k) * N + n
        step, middle = tl.load(scale + row, mask=inside, other=1.0), tl.load(zero + row, mask=inside, other=0.0)
        code = nearest_even(wanted * (1.0 / step) + middle, top)
        value = (code - middle) * step
        lost = tl.load(weight + place, mask=inside, other=0.0) - value
        errors = tl.where(j[:, None] == k, lost[None, :], errors)
        tl.store(codes + place, code, mask=inside)
        tl.store(error + place, lost, mask=inside)
        tl.store(residual + place, wanted - value, mask=inside)


@jit
def nearest_even(value, top):
    """The nearest whole number from 0 to `top` (below 2^22), halves to even: beyond 2^23 a float32 has no fraction."""
    bounded = tl.minimum(tl.maximum(value, 0.0), top)
    return (bounded + 8388608.0) - 8388608.0


def usable(device: torch.device) -> bool:
    """Whether `round_block` runs there."""
    return triton is not None and (device.type == "cuda" or INTERPRET)


def round_block(
    target: torch.Tensor,
    weight: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    group: torch.Tensor,
    top: float,
    codes: torch.Tensor,
    error: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    """Round a block's columns in order, each taking up the errors of those before it in the block.

    `target` [columns, out]: what is wanted of them but for that, `weight` [columns, out]: what they were; `upper`
    [columns, columns]: how much of a row's error a column takes up, any strides; `scale` and `zero` [groups,
    out], of which column k has row `group[k]` (int32). Written: `codes`, 0 to `top`, `error` = weight - value and
    `residual` = wanted - value with value = (code - zero) x scale, all float32 [columns, out].
    """
    count, outputs = target.shape
    if count > COLUMNS:
        raise ValueError(f"a block of {count} columns; supported: {COLUMNS}")
    tensors = (target, weight, upper, scale, zero, group, codes, error, residual)
    for tensor in tensors:
        if tensor is not upper and not tensor.is_contiguous():
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; supported: contiguous"
            )
    _round[(triton.cdiv(outputs, CHANNELS),)](
        *tensors,
        outputs,
        *upper.stride(),
        float(top),
        COUNT=count,
        COLUMNS=COLUMNS,
        CHANNELS=CHANNELS,
        num_warps=1,
    )
