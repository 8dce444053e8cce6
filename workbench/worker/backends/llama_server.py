"""llama.cpp's own server: the `llama-server` on the PATH, or else the one in the package xllamacpp.

It tells no log-probabilities of a prompt (it takes `echo` and ignores it), but those of the whole vocabulary for the
token that comes next (`n_probs`). So it is scored by a request a position, whose prefix it keeps: what its row says of
quality is exact for what it computes, with nothing estimated for a tail. That is a vocabulary of JSON a token, which
bounds how much is asked.

As a program (`python -m workbench.worker.backends.llama_server`) it is that of the package, which has no command line,
under the words of `llama-server` that are used here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from workbench.records import Job, Quality, from_json
from workbench.worker.backends import llamacpp, next_token
from workbench.worker.backends.served import Server, alias, as_row
from workbench.worker.base.gguf_file import field_of, open_parts
from workbench.worker.ggml import model
from workbench.worker.scoring import longrope
from workbench.worker.scoring.reducer import Scoring

WORD = "llama.cpp's server"
MODULE = "xllamacpp"
PACKAGES: tuple[str, ...] = ("xllamacpp",)
INSTALL = "pip install xllamacpp (or put llama.cpp's llama-server on the PATH)"
LOADS: tuple[str, ...] = ("gguf",)
AXES: tuple[str, ...] = ("kv_cache",)
MAKES_REFERENCE = False
ENVIRONMENT: dict[str, str] = {}
BY_NAME = True
SERVER = True
BINARY = "llama-server"


# As in its own process.
Options = llamacpp.Options
unsupported, refuses, needs = llamacpp.unsupported, llamacpp.refuses, llamacpp.needs
serving_command = llamacpp.serving_command


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`. The package's is built for processors; another's is not asked."""
    return False


def load_engine() -> None:
    """See that there is anything to start. Raises `ImportError` if not."""
    if not shutil.which(BINARY):
        import xllamacpp  # noqa: F401


class Engine(Server):
    """A llama-server with a job's file."""

    _doubts: list[str] = []

    def __init__(self, job: Job) -> None:
        options: Options = from_json(Options, job.options)
        threads, name, own = options.threads or len(os.sched_getaffinity(0)), alias(), shutil.which(BINARY)
        layers = max(0, options.gpu_layers)
        row = as_row(job, threads=threads, gpu_layers=layers, device="cpu")
        words = serving_command(job.artifact.path, row) or []
        place, slots = words.index("--ctx-size") + 1, 1
        if "--kv-unified" not in words:
            # Each slot has its share of the context, and a window has to fit into one.
            slots = max(job.workload.batches)
            words[place] = str(max(int(words[place]), slots * (job.longest_window + 1)))
        self._doubts = _of_longrope(job, int(words[place]) // slots)
        program = [own] if own else [sys.executable, "-P", "-m", __name__]
        settings = {"device": "cuda" if layers else "cpu", "threads": threads}
        settings |= {"server": _version(own) if own else "xllamacpp"}
        super().__init__([*program, *words[1:], "--alias", name], name, settings)

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """Reduce what it says of the next token behind every scored prefix. Raises `NotScored` where that is too much
        to ask."""
        quality, doubts = next_token.by_llama_server(asked, progress, self.post)
        self._doubts = [*dict.fromkeys([*self._doubts, *doubts])]
        return quality

    def doubts(self) -> list[str]:
        """What is to be known of its quality."""
        return self._doubts

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt; the server ends at the tokens that its file names too."""
        from workbench.serving.native import BODY, completed

        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            asked = BODY | {"prompt": ids, "n_predict": most, "return_tokens": True}
            found = completed(self.post("/completion", asked)).tokens
            answers.append(found[: next((i for i, token in enumerate(found) if token in stop), len(found))])
        return answers


def _of_longrope(job: Job, context: int) -> list[str]:
    """Where a LongRoPE model is scored with other factors than its windows want: llama.cpp takes the short or the long
    ones by the room that a sequence has, rounded up, and no request changes that."""
    _, original = longrope.original_of_header(partial(field_of, open_parts(Path(job.artifact.path))[0]))
    room = model.context_of(context)
    short = longrope.takes_short(job, original)
    if short is None or short == (room <= original):
        return longrope.warnings(job, original)
    return [
        f"{WORD} makes room for {room:,} tokens a sequence and takes the {'long' if short else 'short'} rope factors "
        f"for all, of a model with an original context of {original:,}: windows of {job.longest_window:,} are another "
        "model's here. Take the engine llamacpp for its quality"
    ]


def _version(program: str) -> str:
    told = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    return next(iter((told.stdout + told.stderr).splitlines()), "")[:200]


def main() -> None:
    """The package's server, until it is ended."""
    import xllamacpp as x

    words = argparse.ArgumentParser(BINARY)
    for name in ("model", "alias", "host", "cache-type-k", "cache-type-v", "flash-attn", "load-mode"):
        words.add_argument(f"--{name}")
    for name in ("ctx-size", "parallel", "threads", "port", "n-gpu-layers"):
        words.add_argument(f"--{name}", type=int)
    words.add_argument("--kv-unified", action="store_true")
    told = words.parse_args()
    params = x.CommonParams()
    params.model.path = told.model
    if told.alias:
        params.model_alias = {told.alias}
    if level := os.environ.get("LLAMA_ARG_LOG_VERBOSITY"):  # as llama-server itself reads it
        params.verbosity = int(level)
    params.hostnames, params.port = [told.host], told.port
    params.n_ctx, params.n_parallel, params.kv_unified = told.ctx_size, told.parallel, told.kv_unified
    params.cpuparams.n_threads = told.threads
    if told.n_gpu_layers is not None:
        params.n_gpu_layers = told.n_gpu_layers
    if told.cache_type_k:
        params.cache_type_k = x.ggml_type[f"GGML_TYPE_{told.cache_type_k.upper()}"]
        params.cache_type_v = x.ggml_type[f"GGML_TYPE_{told.cache_type_v.upper()}"]
    if told.flash_attn:
        params.flash_attn_type = x.llama_flash_attn_type(1 if told.flash_attn == "on" else 0)
    if told.load_mode == "none":
        params.load_mode = x.llama_load_mode.LLAMA_LOAD_MODE_NONE
    server = x.Server(params)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
