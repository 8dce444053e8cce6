"""What measuring costs what is measured: time beside a bare loop of decoding, and memory in the worker.

    python -P benchmarks/profiler_overhead.py FILE.gguf OUT [--rounds 15]

Time: what the workbench's loop does at each step (it looks at the clock and counts tokens) is timed on an engine that
does nothing, where microseconds can be told from noise, and stands as a share of a real engine's step; to it comes the
processor time of the parent, which samples memory, load and clocks meanwhile, as a share of all cores. Shown, not
judged: the real engine in a bare loop and in the workbench's, in turn. Memory: what a worker has allocated (anonymous
resident memory) when it has decoded, against a script that does the same with llama-cpp-python alone. The claims: below
1 % of the decode time, below 60 MB. Exit code 1 if not. Run from the repository root on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from workbench.machine import isolate  # noqa: E402
from workbench.machine.monitor import Monitor  # noqa: E402
from workbench.records import Artifact, Job, Workload  # noqa: E402
from workbench.worker.measure import timing  # noqa: E402

TIME_LIMIT, MEMORY_LIMIT_BYTES = 0.01, 60e6
PROMPT_TOKENS, NEW_TOKENS = 32, 64
BARE = """
import ctypes, json, sys
import llama_cpp as api
import numpy as np
path, threads, prompt, new = json.loads(sys.argv[1])
api.llama_backend_init()
model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
settings = api.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = len(prompt) + new, 512, 512, 1
settings.n_threads = settings.n_threads_batch = threads
context = api.llama_init_from_model(model, settings)
size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
ids = prompt
for _ in range(new):
    given = (api.llama_token * len(ids))(*ids)
    assert api.llama_decode(context, api.llama_batch_get_one(given, len(ids))) == 0
    ids = [int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (size,)).argmax())]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""


def decoding(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: seconds of every round of both loops, and the worker's own anonymous memory in bytes."""
    from workbench.worker.backends import llamacpp

    load = Workload(prompt_tokens=[PROMPT_TOKENS], new_tokens=NEW_TOKENS)
    artifact = Artifact("v", "gguf", "gguf", payload["file"], "", 0, 0)
    engine = llamacpp.Engine(Job("m", artifact, "llamacpp", {"threads": payload["threads"]}, load))
    timing.run(engine, [payload["prompt"]], NEW_TOKENS)
    with open("/proc/self/status") as status:
        own = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
    found: dict[str, list[float]] = {"bare": [], "workbench": []}

    def bare() -> None:
        for _ in engine.generate([payload["prompt"]], NEW_TOKENS):
            pass

    loops = {"bare": bare, "workbench": lambda: timing.run(engine, [payload["prompt"]], NEW_TOKENS)}
    for turn in range(payload["rounds"]):
        for name in list(loops) if turn % 2 else list(loops)[::-1]:
            started = timing.now()
            loops[name]()
            found[name].append(timing.now() - started)
        progress(turn, payload["rounds"], "decoding")
    steps = 100_000

    class Idle:
        """An engine whose steps take no time."""

        def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
            for _ in range(new_tokens):
                yield [1]

    started = timing.now()
    for _ in Idle().generate([[1]], steps):
        pass
    idle_s = timing.now() - started
    started = timing.now()
    timing.run(Idle(), [[1]], steps)
    step_s = (timing.now() - started - idle_s) / steps
    return {"seconds": found, "anonymous_bytes": own, "step_s": step_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("out", type=Path, help="a folder for the worker's log")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    chance = random.Random(0)
    prompt = [chance.randrange(10, 250) for _ in range(PROMPT_TOKENS)]
    payload = {"file": given.file, "threads": threads, "prompt": prompt, "rounds": given.rounds}
    here = Path(__file__).resolve()
    environment = {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1])])}
    before = sum(os.times()[:2])
    reply = isolate.call(
        "profiler_overhead:decoding", payload, workdir=given.out, environment=environment, on_sample=Monitor()
    )
    sampling = (sum(os.times()[:2]) - before) / reply.duration_s / threads
    if reply.value is None:
        sys.exit(f"{reply.error}\n{reply.log}")
    seconds = reply.value["seconds"]
    seen = statistics.median(b / a for a, b in zip(seconds["bare"], seconds["workbench"], strict=True)) - 1
    decode_s = statistics.median(seconds["bare"]) / NEW_TOKENS
    loop = reply.value["step_s"] / decode_s
    plain = subprocess.run(
        [sys.executable, "-P", "-c", BARE, json.dumps([given.file, threads, prompt, NEW_TOKENS])],
        capture_output=True,
        text=True,
        check=True,
    )
    own, alone = reply.value["anonymous_bytes"], int(plain.stdout) * 1024
    more = own - alone
    print(
        f"time: the loop {reply.value['step_s'] * 1e6:.1f} us a step, {loop:.3%} of {decode_s * 1e3:.1f} ms; sampling "
        f"{sampling:.2%} of {threads} cores (goal: below {TIME_LIMIT:.0%} together; in turn: {seen:+.1%})\n"
        f"memory: {own / 1e6:.1f} MB against {alone / 1e6:.1f} MB of llama-cpp-python alone: {more / 1e6:+.1f} MB "
        f"(goal: below {MEMORY_LIMIT_BYTES / 1e6:.0f} MB)"
    )
    return 0 if loop + sampling < TIME_LIMIT and more < MEMORY_LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
