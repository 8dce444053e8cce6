"""transformers through the workbench against its own `generate` with a streamer, interleaved in one process.

    python benchmarks/transformers_generate.py MODEL_DIRECTORY [--prompt 128] [--new 32] [--repeats 12]

Both sides use one loaded model, so nothing but the loop differs: `generate` decides greedily and hands every token to a
streamer that looks at the clock, as a chat program would; the workbench's loop yields after every step. The claim:
time to the first token and decoding speed within 3 %, by the median of the repeats' ratios. Exit code 1 if not, unless
the workbench is the faster.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from typing import Any

from workbench.records import Artifact, Job, Workload
from workbench.worker import timing
from workbench.worker.backends import transformers as backend

LIMIT = 0.03


class Stamps:
    """A streamer that keeps when each token came; the first call hands over the prompt."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, value: Any) -> None:
        self.at_s.append(timing.now())

    def end(self) -> None:
        """Nothing is left to print."""


def main() -> int:
    """Print both sides; 1 if the workbench is slower than the limit allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=12)
    given = parser.parse_args()
    load = Workload(prompt_tokens=given.prompt, new_tokens=given.new)
    artifact = Artifact("base", "base", "safetensors", given.model, "", 0, 0)
    threads = len(os.sched_getaffinity(0))
    engine = backend.Backend(Job("m", artifact, "transformers", {"threads": threads}, load))
    torch, model, chance = engine._torch, engine._model, random.Random(0)

    def fresh() -> list[int]:
        return [chance.randrange(10, 250) for _ in range(given.prompt)]

    def ours() -> tuple[float, float]:
        first_s, step_s, _ = timing.run(engine, [fresh()], given.new)
        return first_s, len(step_s) / sum(step_s)

    def theirs() -> tuple[float, float]:
        inputs, stamps = torch.tensor([fresh()]), Stamps()
        started = timing.now()
        with torch.inference_mode():
            model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=given.new, min_new_tokens=given.new,
                do_sample=False, streamer=stamps, pad_token_id=0,
            )  # fmt: skip
        at = stamps.at_s[1:]
        return at[0] - started, (len(at) - 1) / (at[-1] - at[0])

    sides = {"generate": theirs, "workbench": ours}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for measure in sides.values():
        measure()
    for turn in range(given.repeats):
        for name in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
            found[name].append(sides[name]())
    failed = 0
    for place, what in enumerate(("prefill, tok/s", "decode, tok/s")):
        each = {
            name: [given.prompt / one[0] if place == 0 else one[1] for one in samples]
            for name, samples in found.items()
        }
        rates = {name: statistics.median(values) for name, values in each.items()}
        ratio = statistics.median(b / a for a, b in zip(each["generate"], each["workbench"], strict=True))
        failed += ratio < 1 - LIMIT
        print(f"{what:16} generate {rates['generate']:9.1f}   workbench {rates['workbench']:9.1f}   ratio {ratio:.3f}")
    print(f"\n{failed} of 2 slower by more than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
