"""What a step costs beside its work on a Ray cluster: sent, begun in a process of its own, answered.

    python -P benchmarks/ray_overhead.py [--steps 40] [--job 60]

On a running cluster (`ray start --head`), sends steps that find nothing to do (a recipe that is not there), and prints
the seconds a step took, and their share beside a job of `--job` seconds. The makespan of 2,000 jobs on 16 machines
beside the best schedule's is a test (`tests/cluster/test_schedule.py`), which adds no such costs. Run from the
repository root on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from workbench.cluster.node import Request, Told  # noqa: E402
from workbench.cluster.run import Driver, on  # noqa: E402
from workbench.cluster.schedule import Place, Step  # noqa: E402
from workbench.records import to_json  # noqa: E402


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--steps", type=int, default=40)
    words.add_argument("--job", type=float, default=60.0, help="seconds of a job to compare with")
    asked = words.parse_args()
    machines = on("ray")
    request = json.dumps(to_json(Request("tokens", "/nowhere.yaml", "base: {}", "", "results")))
    answers = []

    def answered(name: str, text: str, place: Place) -> None:
        answers.append(json.loads(text)["error"])

    driver = Driver([Step(f"step {number}") for number in range(asked.steps)], machines, Told())
    started = time.monotonic()
    driver.run(machines.places, lambda name: request, answered, lambda name, why: sys.exit(f"{name}: {why}"))
    spent = (time.monotonic() - started) / asked.steps
    machines.close()
    assert len(answers) == asked.steps and all(answers), "a step found something to do"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{spent:.2f} s a step, one after the other; beside a job of {asked.job:g} s: {spent / asked.job:.1%}")
    print(f"driver: {memory:.0f} MiB at the most")


if __name__ == "__main__":
    main()
