"""How long `workbench --help` takes, a whole process: the best of ten, beside an interpreter that does nothing.

    python -P benchmarks/help_time.py

The claim: below 0.3 s. Exit code 1 if not. What is imported for it is held by tests/test_layers.py.
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
    ours, bare = best_s("-m", "workbench.cli", "--help"), best_s("-c", "pass")
    print(f"--help {ours:.3f} s, an interpreter that does nothing {bare:.3f} s")
    return int(ours >= LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
