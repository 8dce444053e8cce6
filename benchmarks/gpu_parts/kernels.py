"""Every operation of the kernels against its plain reference."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

from gpu_parts import Finding, Place

LIMIT_S = 140


def find(place: Place) -> Iterator[Finding]:
    """Every operation against its plain reference, at all shapes, by every way; with the first tile of each kernel:
    trying all would take the time of the whole check."""
    from bench import TOLERANCE, operations

    os.environ["WORKBENCH_KERNELS_TUNE"] = "0"
    names = list(operations("meta"))
    for name, worst in at_once(place, worst_error, names):
        yield Finding(
            f"{name}, largest error", f"{worst:.1e}", f"< {TOLERANCE:.0e}", worst < TOLERANCE, {"error": worst}
        )


def at_once(place: Place, work: Callable[[str, Place], float], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The answer for each name, in order, from some processes at once: compiling takes most of the time."""
    if place.processes < 2:
        yield from ((name, work(name, place)) for name in names)
        return
    import multiprocessing

    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(place.processes, mp_context=fresh) as pool:
        yield from zip(names, pool.map(work, names, itertools.repeat(place)), strict=True)


def worst_error(name: str, place: Place) -> float:
    """The largest error over the largest output, of products by all ways at all shapes, and of de-quantizing."""
    import torch
    from bench import operations, relative_error

    operation, worst = operations(place.device)[name], 0.0
    for n, k in place.shapes:
        weight = operation.make(n, k)
        for path, rows in place.checked:
            x = torch.randn(rows, k, device=place.device, dtype=torch.float16)
            worst = max(worst, relative_error(operation, x, weight, path)[0])
    return worst
