"""How long `workbench --help` and `import workbench` take, each a whole process: the best of ten, beside an interpreter
that does nothing; and what of the second is the import itself, by `-X importtime`.

    python -P benchmarks/help_time.py

The claim: each below 0.3 s. Exit code 1 if not. What is imported is held by tests/test_layers.py and tests/test_api.py.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

LIMIT_S = 0.3


def best_s(*words: str) -> float:
    """Seconds of the quickest of ten processes."""
    took = []
    for _ in range(10):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=Path(__file__).parents[1], capture_output=True, check=True)
        took.append(time.perf_counter() - started)
    return min(took)


def main() -> int:
    ours, package, bare = (
        best_s("-m", "workbench.cli", "--help"),
        best_s("-c", "import workbench"),
        best_s("-c", "pass"),
    )
    words = [sys.executable, "-X", "importtime", "-c", "import workbench"]
    told = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stderr
    own_us = next(line.split("|")[1].strip() for line in told.splitlines() if line.endswith(" workbench"))
    print(f"--help {ours:.3f} s, import workbench {package:.3f} s (by itself {own_us} us), nothing {bare:.3f} s")
    return int(max(ours, package) >= LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
