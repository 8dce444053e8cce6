"""llama.cpp through the workbench against its own `llama-bench`: one file, threads and lengths, interleaved in one run.

    python benchmarks/llama_bench.py PATH/TO/llama-bench FILE.gguf [FILE.gguf ...] [--threads 2] [--rounds 8]

`llama-bench` builds from the source package of llama-cpp-python (`vendor/llama.cpp`, target llama-bench) with the same
compiler and options as the package. In each round both sides run in processes of their own, in an order that changes
from round to round; a round gives one ratio, of medians over its repeats. The claim: pp512 and tg128 within 3 % of it,
by the median over the rounds. Exit code 1 if not.

llama-bench counts decoding from an empty context and no choice of token; the workbench's 128 steps follow a prompt of
one token and choose the likeliest each time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT = 0.03
PROMPT_TOKENS, NEW_TOKENS = 512, 128


def theirs(bench: str, file: str, threads: int, repeats: int) -> dict[str, list[float]]:
    """Tokens a second of every repeat."""
    command = [bench, "-m", file, "-t", str(threads), "-p", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS)]
    answer = subprocess.run([*command, "-r", str(repeats), "-o", "json"], capture_output=True, text=True, check=True)
    found = {}
    for test in json.loads(answer.stdout):
        found["pp512" if test["n_prompt"] else "tg128"] = [float(rate) for rate in test["samples_ts"]]
    return found


def ours(file: str, threads: int, repeats: int) -> dict[str, list[float]]:
    """The same through the workbench's own worker, in a process of its own."""
    asked = json.dumps({"file": file, "threads": threads, "repeats": repeats})
    answer = subprocess.run(
        [sys.executable, "-P", __file__, "--worker", asked], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def worker(asked: str) -> None:
    """Print `ours` as JSON."""
    from workbench.records import Artifact, Job, Workload
    from workbench.worker import timing
    from workbench.worker.backends import llamacpp

    given = json.loads(asked)
    prefill = Workload(prompt_tokens=PROMPT_TOKENS, new_tokens=2, repeats=given["repeats"])
    decode = Workload(prompt_tokens=1, new_tokens=NEW_TOKENS + 1, repeats=given["repeats"])
    artifact = Artifact("v", "gguf", "gguf", given["file"], "", 0, 0)
    engine = llamacpp.Backend(Job("m", artifact, "llamacpp", {"threads": given["threads"]}, prefill))
    prompts = timing.speeds(engine, prefill, [])[0][0]
    answers = timing.speeds(engine, decode, [])[0][0]
    found = {
        "pp512": [PROMPT_TOKENS / seconds for seconds in prompts.first_token_s],
        "tg128": [len(steps) / sum(steps) for steps in answers.step_s],
    }
    print(json.dumps(found))


def main() -> int:
    """Print a line a file and test; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    failed = 0
    print(f"{'file':44} {'test':6} {'llama-bench':>12} {'workbench':>12} {'ratio':>8}   range of each, t/s")
    for file in given.files:
        sides: dict[str, dict[str, list[list[float]]]] = {"llama-bench": {}, "workbench": {}}
        for turn in range(given.rounds):
            for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                if side == "workbench":
                    found = ours(file, given.threads, given.repeats)
                else:
                    found = theirs(given.bench, file, given.threads, given.repeats)
                for test, rates in found.items():
                    sides[side].setdefault(test, []).append(rates)
        for test in ("pp512", "tg128"):
            turns = {side: [statistics.median(rates) for rates in sides[side][test]] for side in sides}
            peer, own = (statistics.median(each) for each in turns.values())
            ratio = statistics.median(b / a for a, b in zip(*turns.values(), strict=True))
            # Faster is no fault, but it is no agreement either.
            failed += abs(ratio - 1) > LIMIT
            spans = "  ".join(f"{min(each):.1f}..{max(each):.1f}" for each in turns.values())
            print(f"{Path(file).name:44} {test:6} {peer:12.1f} {own:12.1f} {ratio:8.3f}   {spans}", flush=True)
    print(f"\n{failed} of {2 * len(given.files)} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        sys.exit(main())
