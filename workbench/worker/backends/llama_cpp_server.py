"""llama-cpp-python's own server (`python -m llama_cpp.server`), asked over HTTP.

It answers one request at a time and takes prompts as text alone: its speeds are of texts of as many tokens as the ids
that other engines get. It is scored by ids all the same, and on whole windows as in the engine's own process, by an
address that the workbench adds to it (`llama_cpp_inside.py`, which says why its own answers would not do).
"""

from __future__ import annotations

import bisect
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.records import Job, Quality, Row, from_json
from workbench.shape import EngineMemory, Sequences, Shape, Stored
from workbench.worker.backends import llama_cpp_inside, llamacpp
from workbench.worker.backends.served import Server, alias, as_row
from workbench.worker.scoring.reducer import Scoring

if TYPE_CHECKING:
    import torch

    from workbench.serving.prompts import Prompts

WORD = "llama-cpp-python's server"
MODULE = "starlette_context"
PACKAGES: tuple[str, ...] = llamacpp.PACKAGES
INSTALL = "pip install 'llama-cpp-python[server]'"
LOADS: tuple[str, ...] = ("gguf",)
AXES: tuple[str, ...] = ("kv_cache",)
MAKES_REFERENCE = False
ENVIRONMENT: dict[str, str] = {}
BY_NAME = True
SERVER = True
NEEDED = (MODULE, "sse_starlette", "fastapi", "uvicorn", "pydantic_settings")
"""What its extra brings: the first is the one that comes with nothing else."""
TYPES = {"f16": "1", "q8_0": "8"}
"""llama.cpp's numbers of types, `GGML_TYPE_F16` and `GGML_TYPE_Q8_0`."""
ROWS = 64
"""Positions whose logits are asked for at once."""
CHARACTERS = 6
"""A token, more than any text has of this language."""


# As in its own process.
Options = llamacpp.Options
unsupported, refuses, sees_cuda = llamacpp.unsupported, llamacpp.refuses, llamacpp.sees_cuda


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """One sequence at a time, and the logits of every position of it, which it keeps."""
    found = llamacpp.needs(shape, form, stored, load._replace(batch=1), options, cuda)
    return replace(found, workspace=found.workspace + max(load.tokens, load.window) * shape.vocab_size * 4.0)


def serving_command(path: str, row: Row) -> list[str] | None:
    """Requests wait for their turn, where it would by itself break off an answer for whoever asks next. Its own number
    of threads is half of the processors for an answer."""
    options, room = row.options, max(row.workload.longest, row.longest_window) + 1
    words = ["python", "-m", "llama_cpp.server", "--model", path, "--n_ctx", str(room), "--interrupt_requests", "false"]
    threads = (row.measurement.settings if row.measurement else options).get("threads")
    if isinstance(threads, int):
        words += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    layers, cache = options.get("gpu_layers"), options.get("kv_cache")
    if isinstance(layers, int) and (layers >= 0 or row.device != "cpu"):
        words += ["--n_gpu_layers", str(layers)]
    if cache:
        words += ["--type_k", TYPES[str(cache)], "--type_v", TYPES[str(cache)]]
    # The server leaves it off, where llama.cpp by itself decides for it.
    words += ["--flash_attn", str(options.get("flash_attention") is not False).lower()]
    if options.get("mmap") is False:
        words += ["--use_mmap", "false"]
    return [*words, "--host", "127.0.0.1", "--port", "8000"]


def load_engine() -> None:
    """See that the server and what its extra brings are there. Raises `ImportError` if not."""
    llamacpp.load_engine()
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


class Engine(Server):
    """A llama_cpp.server with a job's file."""

    HEALTH = "/v1/models"
    BY_LENGTH = True
    GREEDY: Mapping[str, object] = {"repeat_penalty": 1.0}
    _prompts: Prompts | None = None

    def __init__(self, job: Job) -> None:
        options: Options = from_json(Options, job.options)
        threads, name = options.threads or len(os.sched_getaffinity(0)), alias()
        row = as_row(job, threads=threads)
        words = serving_command(job.artifact.path, row) or []
        words = [sys.executable, "-P", "-m", llama_cpp_inside.__name__, *words[3:], "--model_alias", name]
        device = "cuda" if sees_cuda(None, None) else "cpu"
        super().__init__(words, name, {"device": device, "threads": threads})

    def prompt(self, ids: list[int]) -> tuple[str, int]:
        """A text that nobody has seen, of as many tokens as there are ids, and how many it has: it takes no ids."""
        from workbench.serving.prompts import Prompts

        self._prompts = self._prompts or Prompts(0)
        text = self._prompts.text(CHARACTERS * len(ids))
        end = bisect.bisect_left(range(len(text)), len(ids), key=lambda end: self._tokens(text[:end]))
        return text[:end], self._tokens(text[:end])

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """Reduce each window's logits from its first scored position on."""
        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            progress(index)
            for start in range(first, len(ids) - 1, ROWS):
                reducer(index, start, self._logits(ids, start, min(start + ROWS, len(ids) - 1)))
        return reducer.result()

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt."""
        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            so_far = list(ids)
            while len(so_far) < len(ids) + most:
                token = int(self._logits(so_far, len(so_far) - 1, len(so_far), len(so_far) > len(ids)).argmax())
                if token in stop:
                    break
                so_far.append(token)
            answers.append(so_far[len(ids) :])
        return answers

    def _logits(self, ids: list[int], first: int, last: int, grow: bool = False) -> torch.Tensor:
        """[last - first, vocabulary] float32."""
        import torch

        asked = {"ids": ids, "first": first, "last": last, "grow": grow}
        return torch.frombuffer(bytearray(self.post("/workbench/logits", asked)), dtype=torch.float32).view(
            last - first, -1
        )

    def _tokens(self, text: str) -> int:
        count: int = json.loads(self.post("/extras/tokenize/count", {"input": text}))["count"]
        return count
