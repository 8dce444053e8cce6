"""GGUF blocks made on the GPU."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

from gpu_parts import Finding, Place

LIMIT_S = 40
GOAL = 20.0
"""Weights a second over llama-quantize's."""


def find(place: Place) -> Iterator[Finding]:
    """Blocks made on the GPU, with importances and without: the bytes that llama.cpp's quantizer makes, or ours on
    the CPU where that is not here; and, without, weights a second against llama.cpp's on all processors."""
    import torch
    from workbench_kernels.encoders.encode import ENCODERS, encode

    n, k = place.shapes[0]
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02
    moved = weight.to(place.device)
    with_llama = importlib.util.find_spec("llama_cpp") is not None and importlib.util.find_spec("gguf") is not None
    sample = weight[:: max(1, n // 64)].contiguous()
    importance = torch.rand(k, generator=torch.Generator().manual_seed(1)) ** 4
    for kind in ENCODERS:
        equal, rates = 0, []
        for means in (importance, None):
            means_there = None if means is None else means.to(place.device)
            samples_s = []
            for _ in range(3):
                started = time.perf_counter()
                made = encode(kind, moved, means_there)
                if place.device == "cuda":
                    torch.cuda.synchronize()
                samples_s.append(time.perf_counter() - started)
            rates.append(n * k / min(samples_s))
            mine = made[:: max(1, n // 64)].cpu().contiguous()
            if with_llama:
                from workbench.worker.ggml.encode import same_as_llama_cpp

                numbers = None if means is None else means.numpy()
                equal += same_as_llama_cpp(kind, sample.numpy(), numbers, mine.numpy())
            else:
                equal += int((encode(kind, sample, means) == mine).all(1).sum())
        whose = "llama.cpp's" if with_llama else "the CPU's (no llama.cpp here)"
        rows = 2 * len(sample)
        yield Finding(f"{kind}, rows as {whose}", f"{equal} of {rows}", "all", equal == rows, {"equal": equal})
        with_importances_s, weights_s = rates
        theirs_s = llama_weights_s(kind, weight) if with_llama else None
        ratio = weights_s / theirs_s if theirs_s else None
        yield Finding(
            f"{kind}, encoded",
            f"{weights_s / 1e6:.0f} M weights/s" + (f", {ratio:.1f} x llama.cpp" if ratio else ""),
            f">= {GOAL:.0f} x llama-quantize on {os.cpu_count()} processors",
            None if ratio is None else ratio >= GOAL,
            {
                "weights_s": weights_s,
                "samples_s": samples_s,
                "with_importances_weights_s": with_importances_s,
                "llama_weights_s": theirs_s,
            },
        )


def llama_weights_s(kind: str, weight: Any) -> float:
    """Weights a second that llama.cpp's own quantizer makes, some rows on each processor, as llama-quantize works."""
    import numpy as np
    from workbench_kernels.gguf.types import BLOCK_TYPES

    from workbench.worker.ggml.encode import same_as_llama_cpp

    processors = os.cpu_count() or 1
    rows = min(weight.shape[0], 16 * processors)
    slices = [piece for piece in np.array_split(weight[:rows].numpy(), processors) if len(piece)]
    row_bytes = BLOCK_TYPES[kind].row_bytes(weight.shape[1])
    outs = [np.zeros((len(piece), row_bytes), np.uint8) for piece in slices]
    with concurrent.futures.ThreadPoolExecutor(processors) as pool:
        started = time.perf_counter()
        list(pool.map(lambda piece, out: same_as_llama_cpp(kind, piece, None, out), slices, outs))
        return rows * weight.shape[1] / (time.perf_counter() - started)
