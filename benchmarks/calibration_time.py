"""Time of the default recipe's calibration pass beside that of the program before it found layers by running them.

    python -P benchmarks/calibration_time.py OUT [--before COMMIT] [--pairs 3] [--windows 32] [--methods ...]

Both run the pass of the default recipe (AWQ nearest and compensated, GPTQ, the importance matrix) over the same base
and tokens, from a checkout of their own, each time in a fresh interpreter, in turns (new old, old new, ...), so that
a machine's drift falls on both. The time is that of the whole pass as it says itself, finding and proving layers
included. Prints each and the median ratio of pairs; the goal is 1.05. Run from the repository root (a clone with its
history) on an idle machine; a pass takes two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from calibration_memory import METHODS  # noqa: E402
from quantize_vs_gptqmodel import call, pass_request  # noqa: E402

from workbench.machine import isolate  # noqa: E402
from workbench.recipe.load import Recipe, load  # noqa: E402
from workbench.records import TokensRequest, to_json  # noqa: E402

GOAL = 1.05
BEFORE = "30e9e22^"
"""The commit before layers were found by running them."""


def given(recipe: Recipe, windows: int, out: Path) -> tuple[Path, Path]:
    """The recipe's base and so many windows of its calibration tokens."""
    base, tokens = out / "base", out / "calibration.json"
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    source = recipe.base.source(recipe.path.parent)
    asked = {"source": source, "equivalent": equivalent, "out": str(base)}
    prepared, _ = call("workbench.worker.base.prepare:prepare", asked, out / "work")
    sets = [replace(each, out=str(tokens)) for each in recipe.token_sets() if each.role == "calibration"]
    request = TokensRequest(prepared["path"], [replace(each, windows=windows) for each in sets])
    call("workbench.worker.tokens.windows:build", to_json(request), out / "work")
    return Path(prepared["path"]), tokens


def one_pass(checkout: Path, base: Path, tokens: Path, methods: list[str], out: Path) -> float:
    """Seconds of a pass by the program of a checkout."""
    payload = pass_request(base, tokens, out, {name: METHODS[name] for name in methods}, "float32")
    environment = {"PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "kernels")])}
    where = {"workdir": out / "work", "environment": environment}
    reply = isolate.call("workbench.worker.calibration.run:run", payload, **where)
    if reply.value is None:
        sys.exit(f"{checkout}: {reply.error}\n{reply.log}")
    return float(reply.value["seconds"]["total"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for what is made, emptied before")
    parser.add_argument("--before", default=BEFORE, help="the commit to compare with")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, default=[*METHODS], help="none: the importance matrix alone"
    )
    arguments = parser.parse_args()
    out, git = arguments.out.resolve(), ["git", "-C", str(ROOT), "worktree"]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    subprocess.run([*git, "add", "--detach", "--quiet", str(out / "before"), arguments.before], check=True)
    try:
        base, tokens = given(load(ROOT / "recipes" / "smollm2-135m.yaml"), arguments.windows, out)
        ratios = []
        for pair in range(arguments.pairs):
            order = {"now": ROOT, "before": out / "before"}
            names = sorted(order, reverse=pair % 2 == 0)
            taken = {name: one_pass(order[name], base, tokens, arguments.methods, out / "made") for name in names}
            ratios.append(taken["now"] / taken["before"])
            print(f"now {taken['now']:.1f} s, before {taken['before']:.1f} s: {ratios[-1]:.3f}", flush=True)
    finally:
        subprocess.run([*git, "remove", "--force", str(out / "before")], check=True)
    middle = statistics.median(ratios)
    print(f"median of {len(ratios)} pairs: {middle:.3f} of the time before (goal {GOAL})")
    return 0 if middle <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
