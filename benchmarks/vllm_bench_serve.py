"""The client of a server's load against `vllm bench serve`: the same vLLM server, the same load, in turn.

    python benchmarks/vllm_bench_serve.py MODEL_DIRECTORY [--prompt 64] [--new 16] [--slots 4] [--requests 16]
        [--rounds 8] [--guidellm PROGRAM] [--guidellm-rounds 8] [--paced]

A `vllm serve` without a prefix cache, eager, in bfloat16 on half of the processors; clients are on the others, since a
client that keeps the server from its work would measure itself. In each round each side sends so many requests, so
many at once, whose prompts and answers have these lengths; who begins changes from round to round. The peer's side is
vLLM's own benchmark with its dataset of random tokens, its arguments and its clock. Compared are the medians of the
time to the first token, of the time between tokens (ITL, over all waits) and of that of an answer (TPOT, its mean), and
output tokens a second. The claim: within 5 % of it, by the median ratio of the rounds. Exit code 1 if not.

The peers' requests are text, ours token ids. `--guidellm PROGRAM` does the same with guidellm's command, which has an
environment of its own, its synthetic text and its figures. What it calls inter-token latency is an answer's mean, our
TPOT. `--paced` takes another server, which computes nothing (the first token comes after 200 ms, the others 20 ms
apart): there two clients differ in what they measure and in nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import paired

LIMIT = 0.05
NAME = "served"


@contextlib.contextmanager
def vllm_serve(model: str, room: int) -> Iterator[int]:
    """The port of the server, once it is healthy; clients keep off its processors from here on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    words = f"--model {model} --served-model-name {NAME} --enforce-eager --dtype bfloat16 --no-enable-prefix-caching"
    words += f" --max-model-len {room} --kv-cache-memory-bytes {1 << 29} --host 127.0.0.1 --port {port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split()]
    processors = sorted(os.sched_getaffinity(0))
    half = max(1, len(processors) // 2)
    os.sched_setaffinity(0, processors[:half])
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(program, stdout=log, stderr=log, env=environment, start_new_session=True)
        os.sched_setaffinity(0, processors[half:] or processors)
        try:
            while server.poll() is None:
                with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(health(port)):
                    break
                time.sleep(0.5)
            else:
                sys.exit(f"vllm serve ended with code {server.returncode}")
            yield port
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 9)
            server.wait()


@contextlib.contextmanager
def paced() -> Iterator[int]:
    """The port of a server that waits where another would compute."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.serving.fake_server import fake_server

    with fake_server(models=[NAME], first_s=0.2, token_s=0.02) as server:
        yield urlsplit(server.url).port or 0


def health(port: int) -> str:
    """Where a server says that it is up."""
    return f"http://127.0.0.1:{port}/health"


def theirs(given: dict[str, Any]) -> None:
    """vLLM's own benchmark of a server, again and again."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    bench = importlib.import_module("vllm.benchmarks.serve")
    parser: argparse.ArgumentParser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    bench.add_cli_args(parser)
    folder = tempfile.mkdtemp()
    words = f"--backend openai --base-url http://127.0.0.1:{given['port']} --endpoint /v1/completions --model {NAME}"
    words += f" --tokenizer {given['model']} --dataset-name random --random-input-len {given['prompt']}"
    words += f" --random-output-len {given['new']} --num-prompts {given['requests']} --ignore-eos --temperature 0"
    words += f" --max-concurrency {given['slots']} --save-result --result-dir {folder} --result-filename out.json"

    def turn() -> dict[str, float]:
        with contextlib.redirect_stdout(sys.stderr):
            bench.main(parser.parse_args(words.split()))
        found = json.loads(Path(folder, "out.json").read_text())
        return {
            "TTFT ms": found["median_ttft_ms"],
            "ITL ms": found["median_itl_ms"],
            "TPOT ms": found["median_tpot_ms"],
            "output tok/s": found["output_throughput"],
        }

    paired.answer(turn)


def guidellm(given: dict[str, Any], port: int) -> dict[str, float]:
    """One turn of guidellm's own command."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        target = f"target=http://127.0.0.1:{port}"
        words = [given["guidellm"], "run", "--disable-console"]
        words += ["--backend", f"kind=openai_http,{target},model={NAME},request_format=/v1/completions"]
        words += ["--profile", f"kind=concurrent,streams={given['slots']}"]
        words += ["--constraint", f"kind=max_requests,count={given['requests']}"]
        words += ["--tokenizer", f"kind=hf_auto,model={given['model']}"]
        words += ["--data", f"kind=synthetic_text,prompt_tokens={given['prompt']},output_tokens={given['new']}"]
        words += ["--output", f"kind=json,path={out}"]
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(words, check=True, env={**own, "HF_HUB_OFFLINE": "1"}, capture_output=True)
        found = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    return {
        "TTFT ms": found["time_to_first_token_ms"]["successful"]["median"],
        "TPOT ms": found["inter_token_latency_ms"]["successful"]["median"],
        "output tok/s": found["output_tokens_per_second"]["successful"]["mean"],
    }


def ours(given: dict[str, Any]) -> None:
    """The workbench's client and load."""
    from workbench.report.loads import figures
    from workbench.serving.address import address_of
    from workbench.serving.client import Client, Dialect, Wanted
    from workbench.serving.load import closed

    chance = random.Random(1)

    async def load() -> dict[str, float]:
        prompts = [chance.choices(range(1000, 20000), k=given["prompt"]) for _ in range(given["requests"])]
        wanted = [Wanted(ids, len(ids), given["new"]) for ids in prompts]
        async with Client(address_of(f"127.0.0.1:{given['port']}")) as client:
            dialect = Dialect(NAME, NAME)
            point, _ = await closed(lambda each: client.stream(dialect, each), wanted, given["slots"])
        assert not any(each.error for each in point.requests), point.requests[0].error
        found = figures([point], {})
        assert found and found.ttft_s and found.itl_s and found.tpot_s
        return {
            "TTFT ms": found.ttft_s[0] * 1e3,
            "ITL ms": found.itl_s[0] * 1e3,
            "TPOT ms": found.tpot_s[0] * 1e3,
            "output tok/s": found.output_tok_s,
        }

    paired.answer(lambda: asyncio.run(load()))


def main() -> int:
    """Print both sides of each figure; 1 if one is further apart than the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name, usual in (("prompt", 64), ("new", 16), ("slots", 4), ("requests", 16), ("rounds", 8)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--guidellm", help="its program, in an environment of its own")
    parser.add_argument("--guidellm-rounds", type=int, default=8)
    parser.add_argument("--paced", action="store_true", help="a server that computes nothing, in the place of vLLM's")
    given = parser.parse_args()
    failed = asked = 0
    with paced() if given.paced else vllm_serve(given.model, 2 * (given.prompt + given.new)) as port:
        told = vars(given) | {"port": port}
        own, peer = (paired.Worker(__file__, told | {"side": side}, {}) for side in ("ours", "theirs"))
        peers: dict[str, tuple[paired.Side, int]] = {"vllm bench": (peer, given.rounds)}
        if given.guidellm:
            peers["guidellm"] = (lambda: guidellm(vars(given), port), given.guidellm_rounds)
        own()  # Warms up both ends.
        for name, (side, many) in peers.items():
            side()
            print(f"{'':14} {name:>10} {'workbench':>10}   (medians of {many} rounds)")
            for figure, pairs in paired.rounds(side, own, many).items():
                line, within = paired.verdict(pairs, LIMIT)
                asked, failed = asked + 1, failed + (not within)
                print(f"{figure:14} {line}", flush=True)
        own.close()
        peer.close()
    print(f"\n{failed} of {asked} further apart than {LIMIT:.0%}")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        told = json.loads(sys.argv[2])
        (theirs if told["side"] == "theirs" else ours)(told)
    else:
        sys.exit(main())
