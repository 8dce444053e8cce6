"""Whether a GGUF file is the same model in vLLM and in transformers: divergences from the base, side by side.

    python -P benchmarks/same_weights.py OUT

Both engines de-quantize the file, transformers to float32 and vLLM to bfloat16 unless it is told otherwise. In bfloat16
the two differ by what that rounding does, which grows with the divergence itself; so vLLM computes in float32 here, and
what is left would be another model. Of every GGUF variant of recipes/smollm2-135m-full.yaml it prints the divergence in
both (nats a token) and their difference; exit code 1 if one is over the divergence of vLLM's base from the reference
plus 0.001. What is in OUT already is not made again, and WORKBENCH_HOME may name a cache that has the files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import workbench as wb  # noqa: E402
from workbench.report import estimates, quality  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0.001


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WORKBENCH_HOME", str(out / "cache"))
    whole = yaml.safe_load((ROOT / "recipes" / "smollm2-135m-full.yaml").read_text(encoding="utf-8"))
    variants = ["base", "gguf-*"]
    whole |= {
        "name": "same-weights",
        "workload": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 1},
        "backends": {
            "transformers": {"variants": variants},
            "vllm": {"variants": variants, "dtype": "float32", "enforce_eager": True},
        },
    }
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    run = wb.run(recipe, out / "rows", quiet=False)
    found = {(row.artifact.variant, row.backend): row for row in run.rows if row.measurement}
    divergence = quality.compared(estimates.divergence)
    floor = divergence(found["base", "vllm"])
    assert floor is not None
    limit = floor.value + LIMIT
    print(f"limit: vLLM's own base {floor.value:.5f} + {LIMIT} = {limit:.5f}")
    good = not run.failures
    for name in dict.fromkeys(variant for variant, _ in found if variant != "base"):
        values = [divergence(found[name, engine]) for engine in ("transformers", "vllm")]
        apart = quality.divergence_delta(found[name, "vllm"], found[name, "transformers"])
        assert apart is not None and values[0] is not None and values[1] is not None
        kept = abs(apart.value) <= limit
        good &= kept
        figures = f"transformers {values[0].value:.4f}  vllm {values[1].value:.4f}  difference {apart.value:+.5f}"
        print(f"{name:20} {figures}  {'kept' if kept else 'OVER'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
