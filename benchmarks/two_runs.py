"""Do the intervals of two runs of one recipe overlap? Of each pair's prefill and decode speeds, 95 of 100 are to.

    workbench profile recipes/smollm2-135m.yaml --results one
    workbench profile recipes/smollm2-135m.yaml --results two
    python benchmarks/two_runs.py one two

Each folder gives the newest row of every pair. Prints the pairs that do not overlap. Exit code 1 if there are too many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from workbench.records import Row
from workbench.report import speeds, store

LIMIT = 0.95
SPEEDS: dict[str, Callable[[Row], list[float]]] = {
    "prefill": speeds.prefill_samples,
    "decode": speeds.decode_samples,
}


def main(one: str, two: str) -> int:
    """Print what does not overlap, and the share that does."""
    sides = []
    for place in (one, two):
        rows, warnings = store.read(place)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        sides.append({(row.recipe, row.artifact.variant, row.backend): row for row in rows if row.measurement})
    compared = overlapping = 0
    for key in sorted(sides[0].keys() & sides[1].keys()):
        for what, samples in SPEEDS.items():
            spans = [speeds.median_interval(side[key], samples) for side in sides]
            if spans[0] is None or spans[1] is None:
                continue
            (low, high), (other_low, other_high) = spans
            compared += 1
            if low <= other_high and other_low <= high:
                overlapping += 1
            else:
                print(
                    f"{key[1]:27} {key[2]:13} {what:8} {low:.1f} to {high:.1f} tok/s, "
                    f"then {other_low:.1f} to {other_high:.1f}"
                )
    print(f"{overlapping} of {compared} intervals overlap (goal {LIMIT:.0%})")
    return 0 if compared and overlapping >= LIMIT * compared else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
