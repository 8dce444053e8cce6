"""Blocks made on the device that holds the weights: Q8_0 and Q4_0, byte for byte what llama.cpp writes.

Plain torch, so any device: a step below is one operation over all blocks at once. What has to be the same is the
arithmetic, to the last bit:

- float32 throughout, every product rounded before it is added: llama.cpp builds its quantizers for any x86-64, which
  has no fused multiply-add. (A build for ARM fuses, and differs from this and from x86 in rare last bits.) Torch's
  operators, one after the other, round the same way, on a GPU too;
- sums in the order of the weights, one weight at a time (a parallel sum rounds otherwise);
- `roundf` rounds halves away from zero, `nearest_int` to even.

Q8_0 ignores importances, as llama.cpp does. With importances Q4_0 searches 19 scales for each block for the least error
weighted by importance x sqrt(mean square of the row + w^2). Source: llama.cpp, ggml-quants.c, `quantize_row_q8_0_ref`,
`quantize_row_q4_0_ref`, `quantize_row_q4_0_impl`, `make_qx_quants`.
"""

import torch

from workbench_kernels.checks import short

EPSILON = 1e-15
"""A block whose weights are all smaller is zero (`GROUP_MAX_EPS`); only asked where there are importances."""


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """float32 [out, in], in a multiple of 32 -> uint8 [out, in / 32 x 34]."""
    blocks = _blocks(weight)
    scale = blocks.abs().amax(1, keepdim=True) / torch.tensor(127.0, device=weight.device)
    scaled = blocks * torch.where(scale == 0, scale, 1.0 / scale)
    # Halves away from zero; adding 0.5 first would round 0.49999997 up.
    size = scaled.abs()
    whole = size.floor()
    codes = (whole + (size - whole >= 0.5)).copysign(scaled).to(torch.int8)
    return _rows(weight, _half_bytes(scale), codes.view(torch.uint8))


def q4_0(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [out, in], in a multiple of 32, importances of the inputs float32 [in] or none -> uint8
    [out, in / 32 x 18]."""
    blocks = _blocks(weight)
    # A block of zeros has the largest weight +0, whatever their signs.
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) + 0.0
    if importance is None:
        scale = largest / -8.0
        inverse = torch.where(scale == 0, scale, 1.0 / scale)
        # The cast cuts off the fraction.
        codes = (blocks * inverse + 8.5).to(torch.int8).clamp(max=15)
    else:
        codes, scale = _searched(weight, blocks, largest, importance)
    codes = codes.to(torch.uint8)
    return _rows(weight, _half_bytes(scale), codes[:, :16] | (codes[:, 16:] << 4))


def _searched(
    weight: torch.Tensor, blocks: torch.Tensor, largest: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [blocks, 32] and scales [blocks, 1] by llama.cpp's search (`make_qx_quants`, 8 levels each way)."""
    outputs, inputs = weight.shape
    if importance.shape != (inputs,) or importance.dtype != torch.float32:
        raise ValueError(
            f"importance is {short(importance.dtype)} {tuple(importance.shape)}; supported: float32 [{inputs}]"
        )
    squares = torch.zeros(outputs, device=weight.device)
    for column in weight.t():
        squares = squares + column * column
    # Divided by a tensor: by a number, torch multiplies with its inverse on a GPU.
    spread = (squares / torch.full_like(squares, inputs))[:, None].expand(-1, inputs // 32).reshape(-1, 1)
    per_block = importance.view(1, -1, 32).expand(outputs, -1, -1).reshape(-1, 32)
    # The root through float64: torch's in float32 is not the nearest number everywhere.
    weights = per_block * (spread + blocks * blocks).double().sqrt().float()

    def fit(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes for the scale of one step (0: the plain one), and the sums that say how good it is."""
        reach = torch.tensor(0.1, device=weight.device) * step + 8.0
        codes = (blocks * (-reach / largest)).round().clamp(-8, 7)
        products, norms = torch.zeros_like(largest[:, 0]), torch.zeros_like(largest[:, 0])
        for i in range(32):
            products = products + weights[:, i] * blocks[:, i] * codes[:, i]
            norms = norms + weights[:, i] * codes[:, i] * codes[:, i]
        return codes, products, norms

    codes, products, norms = fit(0)
    scale = torch.where(norms == 0, norms, products / norms)
    best = scale * products
    for step in (*range(-9, 0), *range(1, 10)):
        new_codes, products, norms = fit(step)
        better = (norms > 0) & (products * products > best * norms)
        codes = torch.where(better[:, None], new_codes, codes)
        scale = torch.where(better, products / norms, scale)
        best = torch.where(better, scale * products, best)
    empty = largest.abs() < EPSILON
    codes = torch.where(empty, torch.full_like(codes, -8.0), codes)
    return codes + 8, torch.where(empty, torch.zeros_like(largest), scale[:, None])


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] -> [out x in / 32, 32]; `ValueError` for what cannot be blocks."""
    if weight.dtype != torch.float32 or weight.ndim != 2:
        raise ValueError(f"weight is {short(weight.dtype)} with {weight.ndim} dimensions; supported: float32 [out, in]")
    if weight.shape[1] % 32:
        raise ValueError(f"weight has {weight.shape[1]} columns; supported: multiples of 32")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinity; supported: finite numbers")
    return weight.reshape(-1, 32)


def _half_bytes(scale: torch.Tensor) -> torch.Tensor:
    """float32 [n, 1] -> its float16 as two bytes, uint8 [n, 2]."""
    return scale.to(torch.float16).view(torch.uint8).view(-1, 2)


def _rows(weight: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1).view(weight.shape[0], -1)
