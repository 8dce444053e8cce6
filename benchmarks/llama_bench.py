"""llama.cpp through the workbench against its own `llama-bench`: one file, threads and lengths, interleaved in one run.

    python benchmarks/llama_bench.py PATH/TO/llama-bench FILE.gguf [FILE.gguf ...] [--threads 2] [--processes 16]

`llama-bench` builds from the source package of llama-cpp-python (`vendor/llama.cpp`, target llama-bench). It is run on
the package's own libraries, so that nothing differs but who calls them. The claim: pp512 and tg128 within 3 % of it.
Exit code 1 if not.

Four things are larger than what is to be seen. The machine's speed changes within a second: so both sides run in
slices of 50 ms, in turn, and the time in which one is stopped is taken off its own clock (`paired.sliced`). Where a
process's memory lies is luck worth some percent (huge pages alone are 4 to 8 % of prefill): so all is done again in new
processes, `--processes` times. What a pair of processes took for its samples is one ratio, and the median of those is
the figure. The same code from two library files differs by 3 %, in every process alike: so both load one file. And
where in a page a buffer begins is up to 4 %, which glibc decides by what a program freed before: so llama-bench gets
the environment that the workbench gives its workers for llama.cpp.

llama-bench makes a context for each test, as large as the test needs, and so does this: decoding in a context of
another size is up to a few percent slower. Its tg128 feeds one token 128 times; so does a prompt of one token with an
answer of 128. It counts no choice of token, the workbench chooses the likeliest each time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from functools import partial
from importlib.resources import files
from pathlib import Path

import paired

from workbench.worker.backends import llamacpp

LIMIT = 0.03
TESTS = {"pp512": 512, "tg128": 128}
"""Tokens that a sample of each test counts."""
SAMPLES = 3
STARTS_A_RUN, ENDS_THEM = rb"run \d+/", rb'"samples_ns"'


def theirs(bench: str, file: str, threads: int, test: str) -> paired.Stoppable:
    """llama-bench, stopped where its first sample begins; it says when it begins one."""
    lengths = ("512", "0") if test == "pp512" else ("0", "128")
    command = [bench, "-m", file, "-t", str(threads), "-p", lengths[0], "-n", lengths[1], "-r", str(SAMPLES)]
    mark = re.compile(STARTS_A_RUN + b"|" + ENDS_THEM)
    more = {**llamacpp.ENVIRONMENT, "LD_LIBRARY_PATH": str(files("llama_cpp") / "lib")}
    return paired.Stoppable([*command, "-o", "jsonl", "--progress"], more, lambda said: bool(mark.search(said)))


def their_seconds(side: paired.Stoppable) -> float:
    """Of all samples, on its own clock, less what it was stopped in them."""
    (line,) = [line for line in side.rest().splitlines() if ENDS_THEM in line]
    measured = sum(json.loads(line[line.index(b"{") :])["samples_ns"]) / 1e9
    return float(measured - side.stopped_s(side.marks[0], side.marks[SAMPLES]))


def ours(file: str, threads: int, test: str) -> paired.Stoppable:
    """The same through the workbench."""
    asked = {"file": file, "threads": threads, "test": test}
    more = {**paired.PATHS, **llamacpp.ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", __file__, "--worker", json.dumps(asked)]
    return paired.Stoppable(command, more, lambda said: b'{"sample"' in said)


def our_seconds(side: paired.Stoppable) -> float:
    """Of all samples, on the workbench's clock, less what it was stopped in them."""
    lines = [json.loads(line) for line in side.said.splitlines() if line.startswith(b'{"sample"')]
    samples = [line["sample"] for line in lines[1:]]  # the first was made before it was ever stopped
    return float(sum(end - begin - side.stopped_s(begin, end) for begin, end in samples))


def worker(asked: str) -> None:
    """Its side: the workbench's own backend, warm-up, prompts and clock; a line after each sample."""
    from workbench.records import Artifact, Job, Workload
    from workbench.worker.measure import timing

    given = json.loads(asked)
    prompt, new = (512, 1) if given["test"] == "pp512" else (1, 128)
    load = Workload(prompt_tokens=[prompt], new_tokens=new, repeats=1 + SAMPLES)
    artifact = Artifact("v", "gguf", "gguf", given["file"], "", 0, 0)
    engine = llamacpp.Engine(Job("m", artifact, "llamacpp", {"threads": given["threads"]}, load))
    ticks: list[float] = []

    def clock() -> float:
        ticks.append(timing.now())
        return ticks[-1]

    def stepped(began: float, ended: float) -> None:
        # From the start of the last answer to its last token.
        print(json.dumps({"sample": (ticks[-1 - new], ticks[-1])}), flush=True)

    timing.speeds(engine, load, [], stepped, clock)


def compared(bench: str, file: str, threads: int, test: str, processes: int) -> list[tuple[float, float]]:
    """(theirs, ours) in tokens a second, of every pair of processes."""
    found, both = [], (partial(theirs, bench), ours)
    for turn in range(processes):
        with contextlib.ExitStack() as running:
            sides = {}
            # Who comes first has the first choice of memory.
            for make in both if turn % 2 == 0 else both[::-1]:
                sides[make] = make(file, threads, test)
                running.callback(sides[make].close)
            peer, own = (sides[make] for make in both)
            paired.sliced((peer, own), SAMPLES)
            tokens = TESTS[test] * SAMPLES
            found.append((tokens / their_seconds(peer), tokens / our_seconds(own)))
    return found


def main() -> int:
    """Print a line a file and test; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--processes", type=int, default=16)
    given = parser.parse_args()
    failed = 0
    print(f"{'file':44} {'test':6} {'llama-bench':>10} {'workbench':>10}   (tokens a second)")
    for file in given.files:
        for test in TESTS:
            pairs = compared(given.bench, file, given.threads, test, given.processes)
            line, within = paired.verdict(pairs, LIMIT)
            # Faster is no fault, but it is no agreement either.
            failed += not within
            print(f"{Path(file).name:44} {test:6} {line}", flush=True)
    print(f"\n{failed} of {len(TESTS) * len(given.files)} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        sys.exit(main())
