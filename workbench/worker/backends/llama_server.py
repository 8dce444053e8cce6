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
from typing import TYPE_CHECKING

from workbench.records import Job, Quality, from_json
from workbench.worker.backends import llamacpp
from workbench.worker.backends.served import NotScored, Server, alias, as_row
from workbench.worker.scoring.reducer import Scoring

if TYPE_CHECKING:
    import torch

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
MOST_VALUES = 250 * 10**6
"""Log-probabilities that a row asks for at the most: 100 bytes of JSON each, for all of them a quarter of an hour."""
LEAST = -104.0
"""Log-probability in the place of one that float32 has no number for."""
BODY = {"temperature": 0.0, "cache_prompt": True, "id_slot": 0}
"""Of its own requests: the likeliest token, one slot, what it has of the prefix kept."""
FORCED = 1000.0
"""Added to the logit of a token that is text by itself, so that it is taken: of halves of characters the server tells
nothing. What it tells of all tokens is of the logits as they were."""
ROWS = 64
"""Positions that are reduced at once."""


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

    def __init__(self, job: Job) -> None:
        options: Options = from_json(Options, job.options)
        threads, name, own = options.threads or len(os.sched_getaffinity(0)), alias(), shutil.which(BINARY)
        layers = max(0, options.gpu_layers)
        row = as_row(job, threads=threads, gpu_layers=layers, device="cpu")
        words = serving_command(job.artifact.path, row) or []
        if "--kv-unified" not in words:
            # Each slot has its share of the context, and a window has to fit into one.
            place, slots = words.index("--ctx-size") + 1, max(job.workload.batches)
            words[place] = str(max(int(words[place]), slots * (job.longest_window + 1)))
        program = [own] if own else [sys.executable, "-P", "-m", __name__]
        settings = {"device": "cuda" if layers else "cpu", "threads": threads}
        settings |= {"server": _version(own) if own else "xllamacpp"}
        super().__init__([*program, *words[1:], "--alias", name], name, settings)

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """Reduce what it says of the next token behind every scored prefix. Raises `NotScored` where that is too much
        to ask."""
        import torch

        from workbench.serving.native import tokenized
        from workbench.worker.scoring.reducer import Reducer

        scored = sum(max(0, len(ids) - 1 - first) for _, ids, first in asked.windows)
        if scored * asked.tokens.vocab_size > MOST_VALUES:
            raise NotScored(
                f"{scored:,} positions are too many to ask llama-server for, which tells all "
                f"{asked.tokens.vocab_size:,} log-probabilities of each: the file's quality is in llamacpp's row"
            )
        plain = tokenized(self.post("/tokenize", {"content": "a"})).tokens[-1]
        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            progress(index)
            for start in range(first, len(ids) - 1, ROWS):
                places = range(start, min(start + ROWS, len(ids) - 1))
                rows = [self._next(ids[: place + 1], asked.tokens.vocab_size, plain) for place in places]
                reducer(index, start, torch.stack(rows))
        return reducer.result()

    def _next(self, prefix: list[int], vocab_size: int, plain: int) -> torch.Tensor:
        """[vocabulary] log-probabilities of what follows, of which the token `plain` is taken."""
        import torch

        from workbench.serving.native import completed

        asked = BODY | {"prompt": prefix, "n_predict": 1, "n_probs": 1 << 20, "logit_bias": [[plain, FORCED]]}
        found = completed(self.post("/completion", asked))
        told = found.completion_probabilities[0].top_logprobs if found.completion_probabilities else []
        row = torch.full((max(vocab_size, *(each.id + 1 for each in told)) if told else vocab_size,), -torch.inf)
        row[[each.id for each in told]] = torch.tensor([max(LEAST, each.logprob) for each in told])
        if not torch.isfinite(row[:vocab_size]).all():
            raise RuntimeError(f"{len(told)} log-probabilities of a vocabulary of {vocab_size}: not what was asked for")
        return row[:vocab_size]

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt; the server ends at the tokens that its file names too."""
        from workbench.serving.native import completed

        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            asked = BODY | {"prompt": ids, "n_predict": most, "return_tokens": True}
            found = completed(self.post("/completion", asked)).tokens
            answers.append(found[: next((i for i, token in enumerate(found) if token in stop), len(found))])
        return answers


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
