"""transformers: safetensors as they are, AWQ and GPTQ through its quantizers, GGUF de-quantized at load.

Decoding is a plain greedy loop over `model(...)` with a key-value cache. `generate()` does the same and adds
stopping criteria and processors that differ between models; the loop is what all of them share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.errors import install_with
from workbench.records import Artifact, Job

PACKAGES = ("transformers", "torch")
INSTALL = "pip install transformers accelerate"
FORMATS = ("safetensors", "awq", "gptq", "gguf")
# GPTQModel sizes its worker pools by the cores and refuses to start on two (facts of version 7.6).
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "4"}


@dataclass(frozen=True)
class Options:
    """`dtype: auto` is the checkpoint's own on a GPU; on a CPU float32, but for AWQ and GPTQ, whose kernels there
    compute in bfloat16."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager"] = "sdpa"
    threads: int | None = None
    trust_remote_code: bool = False


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """Every format of ours can be loaded."""
    if artifact.format in FORMATS:
        return None
    return f"transformers does not read {artifact.format}"


def load_engine() -> Any:
    """torch and transformers."""
    import torch
    import transformers  # noqa: F401

    return torch


class Backend:
    """One model; see `backends/__init__.py` for the contract."""

    def __init__(self, job: Job) -> None:
        torch = self._torch = load_engine()
        from transformers import AutoModelForCausalLM

        options, artifact = job.options, job.artifact
        wanted = options.get("device", "auto")
        self._device = "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and self._device != "cuda":
            raise install_with("A CUDA build of torch, or a GPU,", "pip install torch (CUDA build)")
        torch.set_num_threads(options.get("threads") or len(os.sched_getaffinity(0)))
        chosen = options.get("dtype", "auto")
        if chosen == "auto" and self._device == "cpu":
            chosen = "bfloat16" if artifact.format in ("awq", "gptq") else "float32"
        arguments: dict[str, Any] = {
            "dtype": chosen if chosen == "auto" else getattr(torch, chosen),
            "attn_implementation": options.get("attention", "sdpa"),
            "trust_remote_code": options.get("trust_remote_code", False),
            "local_files_only": True,
        }
        if self._device == "cuda":
            arguments["device_map"] = "cuda"
        path = Path(artifact.path)
        if artifact.format == "gguf":
            arguments["gguf_file"] = path.name
            path = path.parent
        else:
            arguments["use_safetensors"] = True
        self._format = artifact.format
        self._model = AutoModelForCausalLM.from_pretrained(str(path), **arguments).eval()

    def score(self, windows: list[tuple[int, list[int], int]], spec: dict[str, Any]) -> dict[str, Any]:
        """One forward a window; the head runs only on the positions that are scored."""
        from workbench.worker.quality import Reducer

        torch, reducer = self._torch, Reducer(spec)
        with torch.inference_mode():
            for index, ids, first in windows:
                inputs = torch.tensor([ids], device=self._device)
                keep = len(ids) - first
                logits = self._model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[0]
                reducer(index, first, logits)
        return reducer.result()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Greedy decoding of prompts of one length together; yields [1, 1, ...] after each step."""
        torch = self._torch
        from transformers import DynamicCache

        with torch.inference_mode():
            cache = DynamicCache(config=self._model.config)
            inputs = torch.tensor(prompts, device=self._device)
            for _ in range(new_tokens):
                output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                inputs = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                if self._device == "cuda":
                    torch.cuda.synchronize()
                yield [1] * len(prompts)

    def memory(self) -> dict[str, int]:
        """Bytes of parameters and buffers; on a GPU the allocator's peaks too."""
        sizes = {"weights": int(self._model.get_memory_footprint())}
        if self._device == "cuda":
            cuda = self._torch.cuda
            sizes["allocated_peak"] = int(cuda.max_memory_allocated())
            sizes["reserved_peak"] = int(cuda.max_memory_reserved())
        return sizes

    def settings(self) -> dict[str, Any]:
        """Device, dtype, threads, and what became of the format."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        settings = {"device": self._device, "dtype": dtype, "threads": self._torch.get_num_threads()}
        if self._device == "cuda":
            settings["device_name"] = self._torch.cuda.get_device_name()
        if self._format == "gguf":
            settings["warnings"] = [
                f"GGUF de-quantized to {dtype} at load: size in memory and speed are those of {dtype}"
            ]
        return settings

    def close(self) -> None:
        """Drop the model."""
        del self._model
