"""GPTQ, version 1 of the layout: w[k, n] = (q[k, n] - zero[g, n]) x scale[g, n] with g = g_idx[k]; 2, 4 or 8 bits.

    qweight   int32 [in x bits / 32, out]       32 / bits input channels a word, the first in the lowest bits
    qzeros    int32 [groups, out x bits / 32]   the same along out; stored less one: zero = (stored + 1) mod 2^bits
    scales    float16 [groups, out]
    g_idx     int32 [in]                        the group of each input channel; k // group size unless act-order

Symmetric checkpoints are a special case: every zero is 2^(bits - 1). Source: GPTQModel, `utils/model.py`; version 2
(`gptq_v2`) stores zeros as they are and is refused by what loads it, not here, since the tensors do not say.

A tile is BR rows of words by BN columns; a word becomes 32 / bits input channels in the registers of the thread that
loaded it. Where g_idx is plain (the module finds out once, at load) scales and zeros are read once a run of input
channels that share them; with act-order they are gathered for every weight, which is slower and as right.
Rejected: sorting the input channels at load to undo act-order. It repacks the weight and permutes every input.
"""

from dataclasses import replace

import torch

from workbench_kernels.backend import (
    Config,
    code_as_float,
    jit,
    packing_of,
    run_length,
    share,
    store_joined,
    tl,
    triton,
    value_of,
)
from workbench_kernels.checks import check_packed, check_same_device
from workbench_kernels.products import Launch, dequantized_by_kernel, multiply, plan

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of a weight's parts, in the order in which all functions take them."""
BITS = (2, 4, 8)
LONGEST_RUN = 128
SMALLEST_RUN = 16


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [words, n] -> uint8 [words x 32 / bits, n]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    codes: torch.Tensor = (packed[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    return codes.to(torch.uint8).reshape(-1, packed.shape[1])


def reference(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    """The weight, float32 [out, in]."""
    codes = unpack(qweight, bits).float()
    zeros = ((unpack(qzeros.t().contiguous(), bits).t().int() + 1) & (2**bits - 1)).float()
    group = g_idx.long()
    weight: torch.Tensor = (codes - zeros[group]) * scales.float()[group]
    return weight.t()


def plain_order(g_idx: torch.Tensor, groups: int) -> bool:
    """Whether groups are runs of equal length in order, so that kernels need not look at `g_idx`. Reads the device."""
    columns = g_idx.shape[0]
    if groups == 0 or columns % groups or (groups > 1 and columns // groups % SMALLEST_RUN):
        return False
    return bool((g_idx.cpu() == torch.arange(columns, dtype=torch.int32) // (columns // groups)).all())


# --- Triton -------------------------------------------------------------------------------------


@jit
def _codes(words, BITS: tl.constexpr):
    """[a, b] packed words -> [a, 32 / bits, b] codes as float32."""
    e = tl.arange(0, 32 // BITS)
    return ((words[:, None, :] >> (BITS * e)[None, :, None]) & (2**BITS - 1)).to(tl.float32)


@jit
def _words(qweight, row, n, K: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """Words [row, n] of rows of words and columns `n`."""
    inside = (row[:, None] < K // (32 // BITS)) & (n[None, :] < N)
    return tl.load(qweight + row[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0)


@jit
def _scales_and_zeros(
    qzeros, scales, g_idx, k, n, group, K: tl.constexpr, N: tl.constexpr, PLAIN: tl.constexpr, BITS: tl.constexpr
):
    """Scales and zeros of input channels `k` [a, e] and columns `n` [b]: [1, 1, b] where the channels share a `group`,
    else [a, e, b]."""
    group = tl.zeros_like(n)[None, None, :] + group
    if not PLAIN:
        group = tl.load(g_idx + k, mask=k < K, other=0)[:, :, None]
    inside = (n < N)[None, None, :]
    scale = tl.load(scales + group * N + n[None, None, :], mask=inside, other=0.0).to(tl.float32)
    place = group * (N // (32 // BITS)) + (n // (32 // BITS))[None, None, :]
    stored = tl.load(qzeros + place, mask=inside, other=0) >> (BITS * (n % (32 // BITS)))[None, None, :]
    return scale, ((stored + 1) & (2**BITS - 1)).to(tl.float32)


@jit
def _decode(
    x,
    qweight,
    qzeros,
    scales,
    g_idx,
    out,
    sums,
    arrived,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PLAIN: tl.constexpr,
    BITS: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    SPLIT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    E: tl.constexpr = 32 // BITS
    ROWS: tl.constexpr = BR if BR * E <= RUN else RUN // E
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    # The middle axis is that of `_scales_and_zeros`: one input channel of a word at a time.
    acc = tl.zeros((ROWS, 1, BN), tl.float32)
    first_run, end = share(part, (K + RUN - 1) // RUN, SPLIT)
    for run in range(first_run, end):
        products = tl.zeros((ROWS, 1, BN), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for step in tl.static_range(RUN // (ROWS * E)):
            first = run * RUN + step * ROWS * E
            row = first // E + tl.arange(0, ROWS)
            words = _words(qweight, row, n, K, N, BITS)[:, None, :]
            for e in tl.static_range(E):
                if e % TOGETHER == 0:
                    packed = tl.load(x + row * (E // TOGETHER) + e // TOGETHER, mask=row < K // E, other=0)
                values = value_of(packed, e % TOGETHER, TYPE).to(tl.float32)
                codes = code_as_float(words, BITS * e, BITS, 0)
                if PLAIN:
                    products += codes * values[:, None, None]
                    total += values
                else:
                    k = row[:, None] * E + e
                    scale, zero = _scales_and_zeros(qzeros, scales, g_idx, k, n, first // GROUP, K, N, PLAIN, BITS)
                    acc += (codes - zero) * scale * values[:, None, None]
        if PLAIN:
            k = run * RUN + tl.zeros((1, 1), tl.int32)
            scale, zero = _scales_and_zeros(qzeros, scales, g_idx, k, n, run * RUN // GROUP, K, N, PLAIN, BITS)
            acc += scale * (products - zero * total[:, None, None])
    y = tl.sum(tl.sum(acc, 1), 0)
    store_joined(y, out, sums, arrived + tl.program_id(0), n, n < N, N, part, SPLIT)


@jit
def _prefill(
    x,
    qweight,
    qzeros,
    scales,
    g_idx,
    out,
    sums,
    arrived,
    M,
    BUCKET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PLAIN: tl.constexpr,
    BITS: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    E: tl.constexpr = 32 // BITS
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    acc = tl.zeros((BM, BN), tl.float32)
    first_run, end = share(part, (K + RUN - 1) // RUN, SPLIT)
    for run in range(first_run, end):
        row = run * (RUN // E) + tl.arange(0, RUN // E)
        k = row[:, None] * E + tl.arange(0, E)[None, :]
        scale, zero = _scales_and_zeros(qzeros, scales, g_idx, k, n, run * RUN // GROUP, K, N, PLAIN, BITS)
        weights = tl.reshape((_codes(_words(qweight, row, n, K, N, BITS), BITS) - zero) * scale, (RUN, BN))
        flat = run * RUN + tl.arange(0, RUN)
        known = (m[:, None] < M) & (flat[None, :] < K)
        values = tl.load(x + m[:, None].to(tl.int64) * K + flat[None, :], mask=known, other=0.0)
        acc = tl.dot(values, weights.to(values.dtype), acc, input_precision="ieee")
    place = m[:, None].to(tl.int64) * N + n[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    store_joined(acc, out, sums, counter, place, (m[:, None] < M) & (n[None, :] < N), M * N, part, SPLIT)


@jit
def _dequantize(
    qweight,
    qzeros,
    scales,
    g_idx,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    PLAIN: tl.constexpr,
    BITS: tl.constexpr,
    BN: tl.constexpr,
):
    E: tl.constexpr = 32 // BITS
    run = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = run * (RUN // E) + tl.arange(0, RUN // E)
    k = row[:, None] * E + tl.arange(0, E)[None, :]
    scale, zero = _scales_and_zeros(qzeros, scales, g_idx, k, n, run * RUN // GROUP, K, N, PLAIN, BITS)
    inside = (row[:, None] < K // E) & (n[None, :] < N)
    codes = _codes(_words(qweight, row, n, K, N, BITS), BITS)
    place = out + k[:, :, None].to(tl.int64) * N + n[None, None, :]
    tl.store(place, (codes - zero) * scale, mask=inside[:, None, :])


DECODE: list[Config] = [
    {"BR": rows, "BN": columns, "num_warps": warps, "num_stages": stages}
    for rows, columns, warps, stages in ((8, 64, 4, 2), (4, 128, 4, 2), (8, 32, 2, 3), (16, 64, 8, 2), (4, 64, 4, 3))
]
PREFILL: list[Config] = [
    {"BM": rows, "BN": columns, "num_warps": warps, "num_stages": 3}
    for rows, columns, warps in ((16, 64, 4), (16, 128, 4), (32, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8))
]


# --- public -------------------------------------------------------------------------------------


def check(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> tuple[int, int]:
    """(in, out) of a weight; `ValueError` that names the tensor unless it is one of this layout."""
    if bits not in BITS:
        raise ValueError(f"qweight has {bits} bits; supported: {', '.join(map(str, BITS))}")
    check_packed(qweight, torch.int32, (None, None), "qweight")
    columns, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    if outputs * bits % 32:
        raise ValueError(f"qweight has {outputs} columns; supported with {bits} bits: multiples of {32 // bits}")
    check_packed(scales, torch.float16, (None, outputs), "scales")
    groups = scales.shape[0]
    if not groups:
        raise ValueError("scales has no groups; supported: at least one")
    check_packed(qzeros, torch.int32, (groups, outputs * bits // 32), "qzeros")
    check_packed(g_idx, torch.int32, (columns,), "g_idx")
    check_same_device({"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx})
    return columns, outputs


def check_g_idx(g_idx: torch.Tensor, groups: int) -> None:
    """`ValueError` if an entry names no group: kernels would read beyond the scales. Reads the device; at load."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx names groups {low} to {high}; supported: 0 to {groups - 1}, the rows of scales")


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    dtype: torch.dtype = torch.float32,
    *,
    plain: bool = False,
    path: str = "auto",
) -> torch.Tensor:
    """The weight as `dtype` [out, in] (its transpose is contiguous). `plain`: what `plain_order` says of `g_idx`."""
    weight = (qweight, qzeros, scales, g_idx)
    columns, outputs = check(*weight, bits)
    if not dequantized_by_kernel(dict(zip(TENSORS, weight, strict=True)), dtype, path):
        return reference(*weight, bits).to(dtype)
    out = torch.empty(columns, outputs, dtype=dtype, device=qweight.device)
    dequantize_launch(weight, bits, plain, out).run()
    return out.t()


def matmul(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    *,
    plain: bool = False,
    path: str = "auto",
) -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out], of x's type, accumulated in float32; see `multiply`.

    `plain`: whether groups are runs in order, `plain_order(g_idx, groups)`; it is not asked here because the answer
    lies on the device.
    """
    weight = (qweight, qzeros, scales, g_idx)
    columns, outputs = check(*weight, bits)
    return multiply(
        x,
        columns,
        outputs,
        dict(zip(TENSORS, weight, strict=True)),
        path,
        reference=lambda flat: (flat.float() @ reference(*weight, bits).t()).to(x.dtype),
        dense=lambda flat: flat @ dequantize(*weight, bits, x.dtype, plain=plain, path="kernel").t(),
        kernel=lambda way, flat: launch(way, flat, weight, bits, plain),
    )


def launch(way: str, x: torch.Tensor, weight: tuple[torch.Tensor, ...], bits: int, plain: bool) -> Launch:
    """The launch of x [rows, in] times the weight, by `decode` (one row) or `prefill`."""
    columns, outputs = x.shape[1], weight[2].shape[1]
    constants = _constants(weight, columns, bits, plain, LONGEST_RUN if way == "decode" else 32)
    steps = triton.cdiv(columns, constants["RUN"])
    named = dict(zip(TENSORS, weight, strict=True))
    tile = ("BN", outputs)
    if way == "prefill":
        return plan(_prefill, x, named, outputs, PREFILL, tile, lambda _: steps, constants)
    made = plan(_decode, x, named, outputs, DECODE, tile, lambda _: steps, {**constants, **packing_of(x)})
    return replace(made, arguments={**made.arguments, "x": x.view(torch.int64)})


def dequantize_launch(weight: tuple[torch.Tensor, ...], bits: int, plain: bool, out: torch.Tensor) -> Launch:
    """The launch that writes the weight into `out` [in, out]."""
    columns, outputs = out.shape
    constants = _constants(weight, columns, bits, plain, 32)
    grid = (triton.cdiv(columns, constants["RUN"]), triton.cdiv(outputs, 64))
    arguments = dict(zip(TENSORS, weight, strict=True)) | {"out": out} | constants
    return Launch(_dequantize, arguments, [{"BN": 64}], (), lambda _: grid)


def _constants(weight: tuple[torch.Tensor, ...], columns: int, bits: int, plain: bool, longest: int) -> dict[str, int]:
    """What the kernels have to know of a weight; `longest`: of the runs that they go in."""
    groups, outputs = weight[2].shape
    group = max(1, columns // groups)
    run = run_length(group, columns, longest) if plain else longest
    return {"N": outputs, "K": columns, "GROUP": group, "RUN": run, "PLAIN": plain, "BITS": bits}
