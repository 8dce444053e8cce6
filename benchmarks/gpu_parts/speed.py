"""How fast the kernels multiply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_parts import Finding, Place

LIMIT_S = 130
COPY_GOAL, FP16_GOAL = 0.85, 3.3
FOUR_BITS = ("awq-4", "gptq-4", "Q4_K")
TIMED = (*FOUR_BITS, "Q6_K", "Q8_0")
"""Of all operations, which are checked."""


def find(place: Place) -> Iterator[Finding]:
    """One row of x against what the memory does in a copy and against torch's fp16 product; many rows against fp16."""
    import torch
    from bench import copy_bandwidth, measure, operations, row_of

    copy_bytes_s = copy_bandwidth()
    yield Finding("copy", f"{copy_bytes_s / 1e9:.0f} GB/s", values={"copy_bytes_s": copy_bytes_s})
    known = operations(place.device)
    torch_s: dict[tuple[int, int, int], float] = {}
    for name in TIMED:
        for n, k in place.shapes:
            for found in measure(known[name], n, k, [1, 2048] if n == k else [1], "auto", torch_s):
                row = row_of(name, "Llama-3.1-8B", "auto", n, k, found, copy_bytes_s)
                yield finding(name, n, k, row)
        torch.cuda.empty_cache()


def finding(name: str, n: int, k: int, row: dict[str, Any]) -> Finding:
    """The line of one product that `bench.row_of` has the figures of."""
    rows = row["rows"]
    what = f"{name} {n} x {k}, {rows} row{'s' if rows > 1 else ''}"
    if row.get("wrong"):
        return Finding(what, f"wrong by {row['error']:.1e}, not timed", "right", False, row)
    fraction, ratio = row["bandwidth_fraction"], row["torch_ratio"]
    found = f"{1e6 * row['seconds']:.1f} us, {fraction:.2f} of copy, {ratio:.2f} x fp16"
    if rows > 1:
        return Finding(what, found, values=row)
    if name in FOUR_BITS:
        holds = fraction >= COPY_GOAL and ratio >= FP16_GOAL
        return Finding(what, found, f"{COPY_GOAL} of copy, {FP16_GOAL} x fp16", holds, row)
    return Finding(what, found, f"{COPY_GOAL} of copy", fraction >= COPY_GOAL, row)
