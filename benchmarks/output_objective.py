"""AWQ and GPTQ by what outputs do: how much less diverges than with the layer's own outputs as the objective.

    python -P benchmarks/output_objective.py OUT [--windows 24]

On the default model and its calibration text, at the same bytes: GPTQ, AWQ and AWQ compensated, each with `objective:
input` and `objective: output`. Divergence from the base is measured in transformers, in float32, on two texts that
nothing has looked at, other help topics of CPython and docstrings of its standard library. Prints ratios of mean
divergences with 95 % intervals, windows as clusters, both texts together and apart; and what the two passes took. The
claim: at most 0.8, on each text. Exit code 1 if not. What is in OUT already is not made again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import yaml

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from best_for_the_bytes import ROOT, TEXTS, docstrings, ratio  # noqa: E402

import workbench as wb  # noqa: E402

LIMIT = 0.8
KINDS = {
    "gptq": ("gptq", {"group_size": 128}),
    "awq": ("awq", {"group_size": 128}),
    "awq-compensated": ("awq", {"group_size": 128, "rounding": "compensated"}),
}
OBJECTIVES = ("input", "output")


def recipe(out: Path, windows: int) -> Path:
    """Of everything that is made and measured, written into `out`."""
    default = yaml.safe_load((ROOT / "recipes" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    (out / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    sources = {"topics": default["evaluation"]["source"], "docstrings": {"file": "docstrings.txt"}}
    whole = {
        "name": "output-objective",
        **{key: default[key] for key in ("model", "base", "calibration")},
        "variants": [
            {method: options | {"objective": objective}, "name": f"{name}-{objective}"}
            for name, (method, options) in KINDS.items()
            for objective in OBJECTIVES
        ],
        "evaluation": {
            text: {"source": source, "window": 512, "windows": windows, "score": "second-half"}
            for text, source in sources.items()
        },
        "workload": {"prompt_tokens": 64, "new_tokens": 8, "repeats": 1},
        "backends": {"transformers": {"dtype": "float32"}},
    }
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


def main() -> int:
    """Print every ratio; 1 if one is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WORKBENCH_HOME", str(out / "cache"))
    run = wb.run(recipe(out, given.windows), out / "rows", quiet=False)
    if run.failures:
        sys.exit("\n".join(f"{name}: {reason}" for name, reason in run.failures.items()))
    rows = {row.artifact.variant: row for row in run.rows if row.measurement}
    kept = True
    for name in KINDS:
        plain, by_outputs = (rows[f"{name}-{objective}"] for objective in OBJECTIVES)
        apart = {text: ratio(by_outputs, plain, [text]) for text in TEXTS}
        kept &= all(found.value <= LIMIT and found.high < 1 for found in apart.values())
        kept &= by_outputs.artifact.disk_bytes == plain.artifact.disk_bytes
        said = ", ".join(f"{text} {found}" for text, found in apart.items())
        print(f"{name:16} {ratio(by_outputs, plain, TEXTS)}; {said}")
    seconds = [rows[f"gptq-{each}"].artifact.provenance["seconds"]["total"] for each in OBJECTIVES]
    print(f"the passes: {seconds[0]:.0f} s and {seconds[1]:.0f} s, three variants each")
    print("kept" if kept else "NOT KEPT")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
