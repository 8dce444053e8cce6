"""Is a worker that was slowed down by a tenth found, and are equal ones not? On a real engine: llama.cpp.

    python benchmarks/slowed_worker.py FILE.gguf [--threads 2] [--rounds 5] [--repeats 20]

In each round three workers are timed, their repeats interleaved: two that are equal, and one that spends a tenth of
every step's own time waiting. Each repeat of one stands beside the same repeat of another, so that drift of the machine
falls out of their ratio. Two are told apart by the rule of `workbench compare`: the 95 % interval of the ratio lies on
one side of 1, and the median ratio is at least 3 % from it. The claim: every slowed worker is found, and of the equal
pairs 5 % at most are told apart. On a machine that does nothing else. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from workbench.records import Artifact, Job, Workload
from workbench.report import speeds
from workbench.worker.backends import llamacpp
from workbench.worker.measure import timing

SLOWER = 0.10
THRESHOLD = 0.03


class Slowed:
    """An engine whose every step takes a tenth longer."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Its steps, each followed by a wait."""
        began = timing.now()
        for gained in self._engine.generate(prompts, new_tokens):
            until = timing.now() + SLOWER * (timing.now() - began)
            while timing.now() < until:
                pass
            yield gained
            began = timing.now()


def main() -> int:
    """Print each round's intervals; 1 if a slowed worker was missed or more than 5 % of the equal pairs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    load = Workload(prompt_tokens=[32], new_tokens=33)
    artifact = Artifact("v", "gguf", "gguf", given.file, "", 0, 0)
    engine = llamacpp.Engine(Job("m", artifact, "llamacpp", {"threads": given.threads}, load))
    workers = {"one": engine, "other": engine, "slowed": Slowed(engine)}
    chance = random.Random(0)
    timing.run(engine, [[1] * 32], 8)
    missed = alarms = 0
    for _ in range(given.rounds):
        rates: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(given.repeats):
            for name in chance.sample(list(workers), len(workers)):
                prompt = [chance.randrange(10, 250) for _ in range(32)]
                _, step_s, _ = timing.run(workers[name], [prompt], load.new_tokens)
                rates[name].append(len(step_s) / sum(step_s))
        told = {}
        for name in ("other", "slowed"):
            ratios = [b / a for a, b in zip(rates["one"], rates[name], strict=True)]
            low, high = speeds.interval(ratios) or (0.0, float("inf"))
            middle = statistics.median(ratios)
            told[name] = (low > 1 or high < 1) and abs(middle - 1) >= THRESHOLD
            print(f"{name:6} / one {middle:.3f} [{low:.3f}, {high:.3f}]", end="   ")
        print(f"one at {statistics.median(rates['one']):.1f} tok/s", flush=True)
        alarms += told["other"]
        missed += not told["slowed"]
    print(f"\n{missed} of {given.rounds} slowed workers missed, {alarms} of {given.rounds} equal pairs told apart")
    return 1 if missed or alarms > 0.05 * given.rounds else 0


if __name__ == "__main__":
    sys.exit(main())
