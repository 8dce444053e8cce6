"""transformers through the workbench against its own `generate` with a streamer, interleaved in one process.

    python benchmarks/transformers_generate.py MODEL_DIRECTORY [--prompt 128] [--new 32] [--rounds 40]

Both sides use one loaded model, so nothing but the loop differs: `generate` decides greedily and hands every token to a
streamer that looks at the clock, as a chat program would; the workbench's loop yields after every step. The claim:
time to the first token and decoding speed within 3 %, by the median ratio of the rounds. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from typing import Any

import paired

from workbench.records import Artifact, Job, Workload
from workbench.worker.backends import transformers as backend
from workbench.worker.measure import timing

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
    """Print both sides; 1 if they are further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    load = Workload(prompt_tokens=[given.prompt], new_tokens=given.new)
    artifact = Artifact("base", "base", "safetensors", given.model, "", 0, 0)
    threads = len(os.sched_getaffinity(0))
    engine = backend.Engine(Job("m", artifact, "transformers", {"threads": threads}, load))
    torch, model, chance = engine._torch, engine._model, random.Random(0)

    def fresh() -> list[int]:
        return [chance.randrange(10, 250) for _ in range(given.prompt)]

    def ours() -> dict[str, float]:
        first_s, step_s, _ = timing.run(engine, [fresh()], given.new)
        return {"prefill": given.prompt / first_s, "decode": len(step_s) / sum(step_s)}

    def theirs() -> dict[str, float]:
        inputs, stamps = torch.tensor([fresh()]), Stamps()
        started = timing.now()
        with torch.inference_mode():
            model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=given.new,
                min_new_tokens=given.new,
                do_sample=False,
                streamer=stamps,
                pad_token_id=0,
            )
        at = stamps.at_s[1:]
        return {"prefill": given.prompt / (at[0] - started), "decode": (len(at) - 1) / (at[-1] - at[0])}

    for warm_up in (theirs, ours):
        warm_up()
    failed = 0
    print(f"{'':7} {'generate':>10} {'workbench':>10}   (tokens a second)")
    for name, pairs in paired.rounds(theirs, ours, given.rounds).items():
        line, within = paired.verdict(pairs, LIMIT)
        failed += not within
        print(f"{name:7} {line}")
    print(f"\n{failed} of 2 further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
