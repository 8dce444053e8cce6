"""The calibration pass shared out over processes beside the same in one: its Gram matrices, and the time.

    python -P benchmarks/shared_calibration.py BASE CALIBRATION OUT [--processes 2 4]

BASE is a Hugging Face directory and CALIBRATION a token file, as a run leaves both in `$WORKBENCH_HOME`. Nothing is
quantized: each pass ends with its Gram matrices and the importance matrix. The distance of a matrix is the norm of the
difference over its own norm; the largest counts. Seconds are of forward passes and Gram matrices as the pass itself
counts them. The same number of processes is run twice, which must give the same bytes. Run from the repository root.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import call, pass_request  # noqa: E402

from workbench.worker.ggml import grams  # noqa: E402

GOAL = 1e-6
"""The largest distance of a matrix."""


def passed(base: Path, tokens: Path, out: Path, processes: int) -> float:
    """Seconds of a pass whose matrices go into `out/grams`."""
    out.mkdir(parents=True, exist_ok=True)
    request = pass_request(base, tokens, out, {}, "float32") | {"grams_out": str(out / "grams"), "devices": processes}
    made, _ = call("workbench.worker.calibration.run:run", request, out / "work")
    assert made["devices"] == processes
    return float(made["seconds"]["forward"] + made["seconds"]["gram"])


def farthest(one: Path, other: Path) -> float:
    """The largest distance of matrices in two folders."""
    left, right = grams.read(one), grams.read(other)
    distances = []
    for name in left.files:
        expected: Any = left.load(name)
        distances.append(float((right.load(name) - expected).norm() / expected.norm()))
    return max(distances)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    alone_s = passed(given.base, given.calibration, given.out / "1", 1)
    print(f"1 process: {alone_s:.1f} s")
    good = True
    for count in given.processes:
        out, again = given.out / str(count), given.out / f"{count}-again"
        seconds = [passed(given.base, given.calibration, folder, count) for folder in (out, again)]
        apart = farthest(given.out / "1" / "grams", out / "grams")
        alike = (out / "imatrix.gguf").read_bytes() == (again / "imatrix.gguf").read_bytes()
        alike = alike and farthest(out / "grams", again / "grams") == 0
        told = "the same again" if alike else "NOT THE SAME again"
        print(f"{count} processes: {min(seconds):.1f} s, {alone_s / min(seconds):.2f} times as fast; ", end="")
        print(f"matrices {apart:.1e} apart, {told}")
        good = good and apart < GOAL and alike
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
