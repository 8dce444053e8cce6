"""llama.cpp through the workbench against its own `llama-bench`: one file, threads and lengths, interleaved in one run.

    python benchmarks/llama_bench.py PATH/TO/llama-bench FILE.gguf [FILE.gguf ...] [--threads 2] [--rounds 30]

`llama-bench` builds from the source package of llama-cpp-python (`vendor/llama.cpp`, target llama-bench) with the same
compiler and options as the package. In each round both sides run once, after a warm-up, each in a process of its own
(where a process's memory lies is good for a few percent of prefill), in an order that changes from round to round
(`paired.py`). The claim: pp512 and tg128 within 3 % of it, by the median ratio of the rounds. Exit
code 1 if not.

llama-bench makes a context for each test, as large as the test needs, and so does this: decoding in the context of
the prefill is a few percent slower. It counts no choice of token; the workbench's 128 steps follow a prompt of one
token and choose the likeliest each time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import paired

LIMIT = 0.03
PROMPT_TOKENS, NEW_TOKENS = 512, 128


def theirs(bench: str, file: str, threads: int) -> dict[str, float]:
    """Tokens a second of one repeat each."""
    command = [bench, "-m", file, "-t", str(threads), "-p", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS)]
    answer = subprocess.run([*command, "-r", "1", "-o", "json"], capture_output=True, text=True, check=True)
    tests = json.loads(answer.stdout)
    return {"pp512" if test["n_prompt"] else "tg128": float(test["samples_ts"][0]) for test in tests}


def ours(file: str, threads: int) -> dict[str, float]:
    """The same through the workbench."""
    process = paired.Worker(__file__, {"file": file, "threads": threads}, {"OMP_NUM_THREADS": str(threads)})
    found = process()
    process.close()
    return found


def worker(asked: str) -> None:
    """Its side: the workbench's own backend and clock."""
    from workbench.records import Artifact, Job, Speed, Workload
    from workbench.worker import timing
    from workbench.worker.backends import llamacpp

    given = json.loads(asked)
    prefill = Workload(prompt_tokens=PROMPT_TOKENS, new_tokens=2, repeats=1)
    decode = Workload(prompt_tokens=1, new_tokens=NEW_TOKENS + 1, repeats=1)
    artifact = Artifact("v", "gguf", "gguf", given["file"], "", 0, 0)

    def timed(load: Workload) -> Speed:
        engine = llamacpp.Backend(Job("m", artifact, "llamacpp", {"threads": given["threads"]}, load))
        speed = timing.speeds(engine, load, [])[0][0]
        engine.close()
        return speed

    def turn() -> dict[str, float]:
        prompt, answer = timed(prefill), timed(decode)
        return {
            "pp512": PROMPT_TOKENS / prompt.first_token_s[0],
            "tg128": len(answer.step_s[0]) / sum(answer.step_s[0]),
        }

    paired.answer(turn)


def main() -> int:
    """Print a line a file and test; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    failed = 0
    print(f"{'file':44} {'test':6} {'llama-bench':>10} {'workbench':>10}   (tokens a second)")
    for file in given.files:
        found = paired.rounds(
            lambda file=file: theirs(given.bench, file, given.threads),
            lambda file=file: ours(file, given.threads),
            given.rounds,
        )
        for test, pairs in found.items():
            line, within = paired.verdict(pairs, LIMIT)
            # Faster is no fault, but it is no agreement either.
            failed += not within
            print(f"{Path(file).name:44} {test:6} {line}", flush=True)
    print(f"\n{failed} of {2 * len(given.files)} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        sys.exit(main())
