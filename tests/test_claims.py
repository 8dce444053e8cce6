"""The published rows keep what the program says of them."""

from __future__ import annotations

import subprocess
import sys

from tests.places import ROOT

ROWS = "results/amd-epyc-2-cores-24-gib"


def claims(cells: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "benchmarks/demo_claims.py", "--results", ROWS, "--cells", str(cells)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_full_recipes_rows_have_no_empty_cell_and_agree() -> None:
    """42 pairs; the same weights in another engine, by divergence (`benchmarks/demo_claims.py` has the limits)."""
    answer = claims(42)
    lines = answer.stdout.splitlines()
    # Speeds decide no test.
    assert [line for line in lines if not line.startswith("holds ") and "decodes" not in line] == [], answer.stderr
    assert sum("in llama.cpp as gguf Q4_" in line for line in lines) >= 3
    assert sum("in vLLM, de-quantized" in line for line in lines) >= 10


def test_a_claim_can_fail() -> None:
    answer = claims(9999)
    assert "FAILS  at least 9999 pairs were measured: " in answer.stdout and answer.returncode == 1
