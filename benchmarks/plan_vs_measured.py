"""A plan against what was measured: bytes of every file, and peak memory of every job, of stored rows.

    python benchmarks/plan_vs_measured.py recipes/smollm2-135m.yaml [ROWS ...]

The claim: predicted weights within 1 % of the file for every variant, predicted need within 10 % of the measured peak
(resident memory of the job's process tree; on a GPU its device memory) in llama.cpp and transformers. Exit code 1 if
one of them fails. vLLM is shown, not judged: what it holds beside weights and cache is its own affair.
"""

from __future__ import annotations

import sys
from pathlib import Path

from workbench.plan import make as plan
from workbench.recipe.load import load
from workbench.report import store

WEIGHTS_LIMIT = 0.01
NEED_LIMIT = 0.10


def main(recipe_file: str, *places: str) -> int:
    """Print a line a job; 1 if a claim fails."""
    recipe = load(recipe_file)
    rows, warnings = store.read(*(places or ["results"]))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    # The newest row of each pair.
    pairs = {(row.artifact.variant, row.backend): row for row in rows if row.recipe == recipe.name}
    needs = {(need.variant, need.backend): need for need in plan.make(recipe).needs if need.need_bytes is not None}
    failed, seen = 0, 0
    print(
        f"{'variant':27} {'backend':13} {'file MB':>9} {'plan':>9} {'error':>8} {'peak MB':>9} {'plan':>9} {'error':>8}"
    )
    for key, need in needs.items():
        row = pairs.get(key)
        if row is None or row.measurement is None:
            continue
        seen += 1
        stored = row.artifact.disk_bytes
        peak = row.measurement.memory.get("peak_vram") or row.measurement.memory.get("peak_rss")
        if not peak or need.need_bytes is None:
            continue
        weights_error, need_error = need.disk_bytes / stored - 1, need.need_bytes / peak - 1
        judged = key[1] in ("llamacpp", "transformers")
        wrong = abs(weights_error) > WEIGHTS_LIMIT or (judged and abs(need_error) > NEED_LIMIT)
        failed += wrong
        print(
            f"{key[0]:27} {key[1]:13} {stored / 1e6:9.1f} {need.disk_bytes / 1e6:9.1f} {weights_error:+8.2%} "
            f"{peak / 1e6:9.1f} {need.need_bytes / 1e6:9.1f} {need_error:+8.2%}{'  FAILED' if wrong else ''}"
            f"{'' if judged else '  (not judged)'}"
        )
    print(f"\n{seen} jobs, {failed} outside {WEIGHTS_LIMIT:.0%} of the file or {NEED_LIMIT:.0%} of the peak")
    return 1 if failed or not seen else 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
