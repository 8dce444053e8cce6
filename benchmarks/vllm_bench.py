"""vLLM through the workbench against `vllm bench latency` and `vllm bench throughput`, interleaved in one run.

    python benchmarks/vllm_bench.py MODEL_DIRECTORY [--prompt 128] [--new 32] [--batch 1] [--prompts 8] [--rounds 30]

Latency: seconds from submitting a batch to its last token. Throughput: prompts of one length submitted at once,
tokens a second of prompts and answers. Both sides run eagerly, in bfloat16 on a CPU, without a prefix cache, each in a
process of its own whose engine is loaded once; in each round both run once, in an order that changes from round to
round (`paired.py`). The peer's side is vLLM's own benchmark, its arguments, loop and clock; only the engine it
makes is kept from turn to turn. The claim: within 5 % of it, by the median ratio of the rounds. Exit code 1 if not.

vLLM's benchmarks sample at temperature 1, the workbench chooses the likeliest token.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import paired

LIMIT = 0.05


def environment() -> dict[str, str]:
    """What both sides run under."""
    from workbench.worker.backends import vllm

    threads = str(len(os.sched_getaffinity(0)))
    return {**vllm.ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def arguments(what: str, given: dict[str, Any], out: str) -> list[str]:
    """Of `vllm bench latency` or `throughput`."""
    command = [
        "--model",
        given["model"],
        "--enforce-eager",
        "--dtype",
        "bfloat16",
        "--no-enable-prefix-caching",
        "--max-model-len",
        str(2 * (given["prompt"] + given["new"])),
        "--kv-cache-memory-bytes",
        str(1 << 29),
        "--disable-detokenize",
        "--output-json",
        out,
    ]
    if what == "latency":
        command += ["--input-len", str(given["prompt"]), "--output-len", str(given["new"]), "--skip-tokenizer-init"]
        command += ["--batch-size", str(given["batch"]), "--num-iters", "1", "--num-iters-warmup", "1"]
    else:
        command += ["--dataset-name", "random", "--num-prompts", str(given["prompts"])]
        command += ["--random-input-len", str(given["prompt"]), "--random-output-len", str(given["new"])]
        command += ["--max-num-seqs", str(given["slots"])]
    return command


def theirs(given: dict[str, Any]) -> None:
    """vLLM's own benchmark, again and again, with the engine that it made the first time."""
    import vllm
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    what, kept = given["what"], list[Any]()
    bench = importlib.import_module(f"vllm.benchmarks.{what}")
    make = vllm.LLM.from_engine_args

    def engine(arguments: Any) -> Any:
        if not kept:
            kept.append(make(arguments))
        return kept[0]

    vllm.LLM.from_engine_args = engine
    parser = FlexibleArgumentParser()
    bench.add_cli_args(parser)
    out = Path(tempfile.mkdtemp(), "out.json")
    asked = parser.parse_args(arguments(what, given, str(out)))

    def turn() -> dict[str, float]:
        with contextlib.redirect_stdout(sys.stderr):
            bench.main(asked)
        found = json.loads(out.read_text())
        return {what: statistics.median(found["latencies"]) if what == "latency" else found["tokens_per_second"]}

    paired.answer(turn)


def ours(given: dict[str, Any]) -> None:
    """The same through the workbench's backend and clock."""
    from workbench.records import Artifact, Job, Workload
    from workbench.worker.backends import vllm
    from workbench.worker.measure import timing

    what, many = given["what"], given["prompts"]
    batch = given["batch"] if what == "latency" else given["slots"]
    load = Workload(prompt_tokens=[given["prompt"]], new_tokens=given["new"], batches=[batch], repeats=1)
    artifact = Artifact("base", "base", "safetensors", given["model"], "", 0, 1)
    engine = vllm.Engine(Job("m", artifact, "vllm", {"enforce_eager": True}, load))

    def turn() -> dict[str, float]:
        if what == "latency":
            for fresh in timing.prompts(load, [], given["prompt"], batch, 2, 0):
                first_s, step_s, _ = timing.run(engine, fresh, load.new_tokens)
            return {what: first_s + sum(step_s)}
        fresh = timing.prompts(load, [], given["prompt"], many, 1, 0)[0]
        started = timing.now()
        sum(engine.serve(fresh, [load.new_tokens] * many, batch))
        return {what: many * (given["prompt"] + load.new_tokens) / (timing.now() - started)}

    paired.answer(turn)


def main() -> int:
    """Print both sides of both tests; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=["latency", "throughput"])
    given = parser.parse_args()
    failed = 0
    tests = [given.only] if given.only else ["latency", "throughput"]
    print(f"{'':10}      {'vllm bench':>10} {'workbench':>10}   (seconds a batch; tokens a second)")
    for what in tests:
        asked = vars(given) | {"what": what}
        sides = [paired.Worker(__file__, asked | {"side": side}, environment()) for side in ("theirs", "ours")]
        for side in sides:
            side()  # loads, and warms up
        for pairs in paired.rounds(sides[0], sides[1], given.rounds).values():
            line, within = paired.verdict(pairs, LIMIT)
            failed += not within
            print(f"{what:10}      {line}", flush=True)
        for side in sides:
            side.close()
    print(f"\n{failed} of {len(tests)} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        asked = json.loads(sys.argv[2])
        (theirs if asked["side"] == "theirs" else ours)(asked)
    else:
        sys.exit(main())
