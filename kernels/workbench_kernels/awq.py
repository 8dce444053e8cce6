"""AWQ, AutoAWQ's "gemm" layout: 4 bits with zero points, w[k, n] = (q[k, n] - zero[k // g, n]) x scale[k // g, n].

    qweight   int32 [in, out / 8]       eight columns a word
    qzeros    int32 [in / g, out / 8]   the same, as they are (nothing subtracted)
    scales    float16 [in / g, out]

Bits 4i ... 4i + 3 of word c hold column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; so column 8c + e is at bit 4 (e // 2) for
even e and 16 + 4 (e // 2) for odd e. Source: AutoAWQ, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.

W is stored transposed: words of one input channel lie side by side. A tile is BK input channels by BC words; a word
becomes eight columns in the registers of the thread that loaded it. Inside a run of input channels that share their
scales the sums are of bare codes, sum (q - z) s x = s (sum q x - z sum x), so scales and zeros are read and
applied once a run.
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

TENSORS = ("qweight", "qzeros", "scales")
"""Names of a weight's parts, in the order in which all functions take them."""
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
LONGEST_RUN = 128
SMALLEST_RUN = 16
"""What the matrix units take; so group sizes are multiples of it, or whole columns."""


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """int32 [n, words] -> uint8 [n, words x 8], columns in order."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for nibble, column in enumerate(NIBBLES):
        codes[:, :, column] = ((packed >> (4 * nibble)) & 15).to(torch.uint8)
    return codes.view(packed.shape[0], -1)


def reference(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight, float32 [out, in]."""
    codes, zeros = unpack(qweight).float(), unpack(qzeros).float()
    groups, outputs = scales.shape
    table = codes.view(groups, -1, outputs)
    return ((table - zeros[:, None]) * scales.float()[:, None]).view(-1, outputs).t()


# --- Triton -------------------------------------------------------------------------------------


@jit
def _codes(words):
    """[a, b] packed words -> [a, b, 8] codes as float32, columns in order; all eight of a word in one thread."""
    # Column e = 4 h + 2 i + j is at bit 16 j + 4 (2 h + i); `join` adds an axis of two, the last: h, then i, then j.
    even = tl.join(_both(words, 0), _both(words, 4))
    odd = tl.join(_both(words, 16), _both(words, 20))
    return tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 8))


@jit
def _both(words, bit: tl.constexpr):
    return tl.join(code_as_float(words, bit, 4, 0), code_as_float(words, bit + 8, 4, 0))


@jit
def _words(qweight, k, c, K: tl.constexpr, words: tl.constexpr):
    """Words [k, c] of input channels `k`."""
    inside = (k[:, None] < K) & (c[None, :] < words)
    return tl.load(qweight + k[:, None].to(tl.int64) * words + c[None, :], mask=inside, other=0)


@jit
def _scale_and_zero(qzeros, scales, group, c, n, N: tl.constexpr):
    """Scales [c, 8] and zeros [1, c, 8] that a group has for the columns `n` [c, 8] of words `c`."""
    scale = tl.load(scales + group * N + n, mask=n < N, other=0.0).to(tl.float32)
    words = tl.load(qzeros + group * (N // 8) + c, mask=c < N // 8, other=0)
    return scale, _codes(words[None, :])


@jit
def _decode(
    x,
    qweight,
    qzeros,
    scales,
    out,
    sums,
    arrived,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    SPLIT: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    STEPS: tl.constexpr = RUN // BK
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    n = c[:, None] * 8 + tl.arange(0, 8)[None, :]
    acc = tl.zeros((BK, BC, 8), tl.float32)
    first, end = share(part, (K + RUN - 1) // RUN, SPLIT)
    for run in range(first, end):
        products = tl.zeros((BK, BC, 8), tl.float32)
        total = tl.zeros((BK,), tl.float32)
        for step in tl.static_range(STEPS):
            # A thread takes neighbours one after the other, so that their x are one word.
            k = run * RUN + tl.arange(0, BK) * STEPS + step
            if STEPS % TOGETHER != 0:
                packed = tl.load(x + k // TOGETHER, mask=k < K, other=0)
                values = value_of(packed, k % TOGETHER, TYPE).to(tl.float32)
            else:
                if step % TOGETHER == 0:
                    packed = tl.load(x + k // TOGETHER, mask=k < K, other=0)
                values = value_of(packed, step % TOGETHER, TYPE).to(tl.float32)
            products += _codes(_words(qweight, k, c, K, N // 8)) * values[:, None, None]
            total += values
        scale, zero = _scale_and_zero(qzeros, scales, (run * RUN) // GROUP, c, n, N)
        acc += scale[None, :, :] * (products - zero * total[:, None, None])
    store_joined(tl.sum(acc, 0), out, sums, arrived + tl.program_id(0), n, n < N, N, part, SPLIT)


@jit
def _prefill(
    x,
    qweight,
    qzeros,
    scales,
    out,
    sums,
    arrived,
    M,
    BUCKET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    part = tl.program_id(2)
    n = c[:, None] * 8 + tl.arange(0, 8)[None, :]
    acc = tl.zeros((BM, BC * 8), tl.float32)
    first, end = share(part, (K + RUN - 1) // RUN, SPLIT)
    for run in range(first, end):
        k = run * RUN + tl.arange(0, RUN)
        scale, zero = _scale_and_zero(qzeros, scales, (run * RUN) // GROUP, c, n, N)
        weights = tl.reshape((_codes(_words(qweight, k, c, K, N // 8)) - zero) * scale[None, :, :], (RUN, BC * 8))
        known = (m[:, None] < M) & (k[None, :] < K)
        values = tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=known, other=0.0)
        acc = tl.dot(values, weights.to(values.dtype), acc, input_precision="ieee")
    columns = tl.program_id(1) * BC * 8 + tl.arange(0, BC * 8)
    place = m[:, None].to(tl.int64) * N + columns[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    store_joined(acc, out, sums, counter, place, (m[:, None] < M) & (columns[None, :] < N), M * N, part, SPLIT)


@jit
def _dequantize(
    qweight,
    qzeros,
    scales,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    BC: tl.constexpr,
):
    run = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    n = c[:, None] * 8 + tl.arange(0, 8)[None, :]
    k = run * RUN + tl.arange(0, RUN)
    scale, zero = _scale_and_zero(qzeros, scales, (run * RUN) // GROUP, c, n, N)
    inside = (k[:, None] < K) & (c[None, :] < N // 8)
    weights = (_codes(_words(qweight, k, c, K, N // 8)) - zero) * scale[None, :, :]
    tl.store(out + k[:, None, None].to(tl.int64) * N + n[None, :, :], weights, mask=inside[:, :, None])


DECODE: list[Config] = [
    {"BK": rows, "BC": words, "num_warps": warps, "num_stages": stages}
    for rows, words, warps, stages in ((16, 16, 4, 2), (8, 32, 4, 2), (16, 8, 2, 3), (16, 32, 8, 2), (8, 16, 2, 3))
]
PREFILL: list[Config] = [
    {"BM": rows, "BC": words, "num_warps": warps, "num_stages": 3}
    for rows, words, warps in ((16, 8, 4), (16, 16, 4), (32, 8, 4), (64, 16, 4), (64, 16, 8), (128, 16, 8))
]


# --- public -------------------------------------------------------------------------------------


def check(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> tuple[int, int, int]:
    """(in, out, group size) of a weight; `ValueError` that names the tensor unless it is one of this layout."""
    check_packed(qweight, torch.int32, (None, None), "qweight")
    columns, outputs = qweight.shape[0], qweight.shape[1] * 8
    check_packed(scales, torch.float16, (None, outputs), "scales")
    groups = scales.shape[0]
    check_packed(qzeros, torch.int32, (groups, outputs // 8), "qzeros")
    check_same_device({"qweight": qweight, "qzeros": qzeros, "scales": scales})
    if not groups or columns % groups:
        raise ValueError(f"scales has {groups} groups for {columns} input channels; supported: groups of one size")
    group = columns // groups
    if group < columns and group % SMALLEST_RUN:
        raise ValueError(
            f"scales has groups of {group}; supported: multiples of {SMALLEST_RUN}, or one group for all {columns}"
        )
    return columns, outputs, group


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    path: str = "auto",
) -> torch.Tensor:
    """The weight as `dtype` [out, in] (its transpose is contiguous). `path`: `auto`, `reference` or `kernel`."""
    weight = (qweight, qzeros, scales)
    columns, outputs, group = check(*weight)
    if not dequantized_by_kernel(dict(zip(TENSORS, weight, strict=True)), dtype, path):
        return reference(*weight).to(dtype)
    out = torch.empty(columns, outputs, dtype=dtype, device=qweight.device)
    dequantize_launch(weight, out).run()
    return out.t()


def matmul(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, path: str = "auto"
) -> torch.Tensor:
    """x [..., in] @ W^T -> [..., out], of x's type, accumulated in float32; see `multiply`."""
    weight = (qweight, qzeros, scales)
    columns, outputs, group = check(*weight)
    return multiply(
        x,
        columns,
        outputs,
        dict(zip(TENSORS, weight, strict=True)),
        path,
        reference=lambda flat: (flat.float() @ reference(*weight).t()).to(x.dtype),
        dense=lambda flat: flat @ dequantize(*weight, x.dtype, path="kernel").t(),
        kernel=lambda way, flat: launch(way, flat, weight),
    )


def launch(way: str, x: torch.Tensor, weight: tuple[torch.Tensor, ...]) -> Launch:
    """The launch of x [rows, in] times the weight, by `decode` (one row) or `prefill`."""
    columns, (groups, outputs) = x.shape[1], weight[2].shape
    run = run_length(columns // groups, columns, LONGEST_RUN if way == "decode" else 32)
    constants = {"N": outputs, "K": columns, "GROUP": columns // groups, "RUN": run}
    named, tile, steps = dict(zip(TENSORS, weight, strict=True)), ("BC", outputs // 8), triton.cdiv(columns, run)
    if way == "prefill":
        return plan(_prefill, x, named, outputs, PREFILL, tile, lambda _: steps, constants)
    words = (torch.nn.functional.pad(x, (0, -columns % 4)) if columns % 4 else x).view(torch.int64)
    made = plan(_decode, x, named, outputs, DECODE, tile, lambda _: steps, {**constants, **packing_of(x)})
    return replace(made, arguments={**made.arguments, "x": words})


def dequantize_launch(weight: tuple[torch.Tensor, ...], out: torch.Tensor) -> Launch:
    """The launch that writes the weight into `out` [in, out]."""
    columns, outputs = out.shape
    group = columns // weight[2].shape[0]
    run = run_length(group, columns, 32)
    constants = {"out": out, "N": outputs, "K": columns, "GROUP": group, "RUN": run}
    grid = (triton.cdiv(columns, run), triton.cdiv(outputs, 128))
    return Launch(_dequantize, dict(zip(TENSORS, weight, strict=True)) | constants, [{"BC": 16}], (), lambda _: grid)
