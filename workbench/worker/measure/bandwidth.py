"""Bytes a second that the memory copies."""

from __future__ import annotations

import threading
from typing import Any

from workbench.records import Bandwidth, BandwidthRequest, from_json, to_json
from workbench.worker.measure.timing import now

COPY_BYTES = 128 << 20
"""A thread's buffer: several times a processor's last cache."""
COPY_S = 0.4


def copy_bandwidth(payload: object, progress: Any) -> object:
    """Worker for a `BandwidthRequest`: the `Bandwidth` of this machine's copies (as STREAM counts them).

    The best of several passes: what the memory can do, not what it did beside something else.
    """
    request: BandwidthRequest = from_json(BandwidthRequest, payload)
    progress(0, 1, "copy bandwidth")
    if request.device == "cuda":
        return to_json(Bandwidth(_cuda_bandwidth()))
    import ctypes

    threads = request.threads
    pairs = [(ctypes.create_string_buffer(COPY_BYTES), ctypes.create_string_buffer(COPY_BYTES)) for _ in range(threads)]

    def copy(pair: tuple[Any, Any], gate: threading.Barrier) -> None:
        gate.wait()
        ctypes.memmove(pair[0], pair[1], COPY_BYTES)  # without the interpreter's lock
        gate.wait()

    for into, out in pairs:
        ctypes.memset(out, 1, COPY_BYTES)
        ctypes.memset(into, 0, COPY_BYTES)
    best, spent = 0.0, 0.0
    while spent < COPY_S or not best:
        gate = threading.Barrier(threads + 1)
        crew = [threading.Thread(target=copy, args=(pair, gate)) for pair in pairs]
        for member in crew:
            member.start()
        gate.wait()
        started = now()
        gate.wait()
        took = now() - started
        for member in crew:
            member.join()
        spent += took
        best = max(best, 2 * COPY_BYTES * threads / took)
    return to_json(Bandwidth(best))


def _cuda_bandwidth() -> float:
    import torch

    out = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    into = torch.empty_like(out)
    best = 0.0
    for _ in range(12):
        torch.cuda.synchronize()
        started = now()
        into.copy_(out)
        torch.cuda.synchronize()
        best = max(best, 2 * out.numel() / (now() - started))
    return best
