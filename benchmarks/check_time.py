"""What it costs to check that files are as they were made, beside loading them: `check_time.py [RECIPE]`.

Runs the recipe (default: recipes/tiny.yaml), then times the check before use of everything that its jobs used, and
prints it as a part of the artifact's shortest load in any engine, of the others as a part of the shortest load of all;
and how long reading everything through takes (`workbench cache verify`). Exits with 1 if a check takes more than 1 % of
a load.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workbench.console import Console
from workbench.home import home
from workbench.intact import as_made
from workbench.quantize.base import prepare
from workbench.recipe.load import load
from workbench.records import Artifact, PreparedBase, Reference, TokenSets
from workbench.report import store

MOST = 0.01
REPEATS = 21


def seconds(file: Path, record: type) -> float:
    """Median time of one check."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        as_made(file, record)
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


def main() -> int:
    recipe = load(Path(sys.argv[1] if len(sys.argv) > 1 else "recipes/tiny.yaml"))
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, "-m", "workbench.cli", "run", str(recipe.path), "--results", results, "--quiet"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        rows = [row for row in store.read(results)[0] if row.measurement and row.measurement.load_s]
    prepare(recipe, Console(quiet=True))
    loads: dict[str, tuple[str, float]] = {}
    for row in rows:
        load_s = row.measurement.load_s if row.measurement and row.measurement.load_s else 0.0
        folder = Path(row.artifact.path.replace("$WORKBENCH_HOME", str(home()))).parent
        while folder.parent.parent != home():
            folder = folder.parent
        name = f"{row.artifact.variant} ({row.artifact.format})"
        loads[str(folder)] = min(loads.get(str(folder), (name, load_s)), (name, load_s), key=lambda each: each[1])
    shortest = min(load_s for _, load_s in loads.values())
    worst = 0.0
    print(f"{'':34} {'check':>10} {'load':>10} {'ratio':>8}")
    kinds: dict[str, type] = {
        "bases": PreparedBase,
        "artifacts": Artifact,
        "tokens": TokenSets,
        "references": Reference,
    }
    for kind, record in kinds.items():
        for file in sorted((home() / kind).glob(f"*/{kind.rstrip('s')}.json")):
            name, load_s = loads.get(str(file.parent), (f"{kind} {file.parent.name}", shortest))
            check_s = seconds(file, record)
            worst = max(worst, check_s / load_s)
            print(f"{name:34} {check_s * 1e3:7.2f} ms {load_s * 1e3:7.0f} ms {check_s / load_s:8.3%}")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "workbench.cli", "cache", "verify", "--quiet"], check=True)
    print(f"all of it read through: {time.perf_counter() - start:.1f} s")
    print(f"worst ratio {worst:.3%}, at most {MOST:.0%}")
    return 1 if worst > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
