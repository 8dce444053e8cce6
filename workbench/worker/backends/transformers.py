"""transformers: safetensors as they are, AWQ and GPTQ through its quantizers, GGUF de-quantized at load.

With `kernel: workbench` AWQ, GPTQ and GGUF stay packed instead (`packed.py`).

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
from workbench.worker.backends import packed
from workbench.worker.base.gguf_config import load_gguf

PACKAGES = ("transformers", "torch")
INSTALL = "pip install transformers accelerate"
FORMATS = ("safetensors", "awq", "gptq", "gguf")
# GPTQModel sizes its worker pools by the cores and refuses to start on two (facts of version 7.6).
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "4"}

M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 32 << 20
"""glibc's name for what is mapped apart, and where its own adjustment ends (mallopt(3))."""


@dataclass(frozen=True)
class Options:
    """`dtype: auto` is the checkpoint's own on a GPU; on a CPU float32, but for AWQ and GPTQ, whose kernels there
    compute in bfloat16."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["sdpa", "eager"] = "sdpa"
    kv_cache: Literal["auto"] | None = None
    """Of the model's dtype: its quantized caches need a library more, and de-quantize at every step."""
    kernel: Literal["auto", "workbench", "gptqmodel"] = "auto"
    """What computes with AWQ, GPTQ and GGUF weights. `workbench`: they stay packed (`kernels/`), on a CPU slowly.
    `gptqmodel`: AWQ and GPTQ by that package; a GGUF, which it does not read, is de-quantized. `auto`: `gptqmodel`,
    until the kernels have been measured on a GPU."""
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

    continuous = False

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
        self._format, self._scored_in, self._path = artifact.format, "", artifact.path
        self._first_point, self._cache_bytes = job.workload.points[0], 0
        self._packed: dict[str, Any] = {}
        if options.get("kernel") == "workbench" and artifact.format in packed.FORMATS:
            self._load_packed(Path(artifact.path), options)
            return
        if artifact.format == "gguf":
            # Not by itself: it leaves keys and tensors out without a word.
            self._model = load_gguf(path, **arguments).eval()
            return
        self._model = AutoModelForCausalLM.from_pretrained(str(path), use_safetensors=True, **arguments).eval()
        if self._device == "cpu" and artifact.format in ("awq", "gptq"):
            self._repack()

    def _load_packed(self, path: Path, options: dict[str, Any]) -> None:
        """By `kernels/`; float32 on a CPU, where the reference computes."""
        dtype = options.get("dtype", "auto")
        if dtype == "auto":
            dtype = "float32" if self._device == "cpu" else None
        loaded = packed.load(
            path,
            self._format,
            dtype=dtype,
            device=self._device,
            attention=options.get("attention", "sdpa"),
            trust_remote_code=options.get("trust_remote_code", False),
        )
        self._model = loaded.model
        self._packed = {"kernel": "workbench", "packed": loaded.packed, "unpacked": loaded.dense}

    def _repack(self) -> None:
        """Have GPTQModel lay out every layer for its CPU kernel now, as part of loading.

        It does so in each layer's first forward, and what it unpacks there lies between what stays, so that the C
        library's heap cannot shrink again: three to six bytes a weight, for good. Blocks from mappings of their own
        are given back.
        """
        import ctypes

        libc = ctypes.CDLL(None)
        tuned = hasattr(libc, "mallopt") and libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)
        with self._torch.inference_mode():
            self._model(input_ids=self._torch.tensor([[1, 2]]), use_cache=False)
        if tuned:
            libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)

    def score(self, windows: list[tuple[int, list[int], int]], spec: dict[str, Any]) -> dict[str, Any]:
        """One forward a window; the head runs only on the positions that are scored."""
        from workbench.worker.scoring import head
        from workbench.worker.scoring.reducer import Reducer

        torch, reducer = self._torch, Reducer(spec)
        with torch.inference_mode(), head.in_float32(self._model) as widened:
            for index, ids, first in windows:
                inputs = torch.tensor([ids], device=self._device)
                keep = len(ids) - first
                logits = self._model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[0]
                reducer(index, first, logits)
        self._scored_in = "float32" if widened else str(logits.dtype).removeprefix("torch.")
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
            self._kept(cache, (len(prompts[0]), len(prompts)))

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Groups of `slots` prompts one after the other, each until its longest answer is done: as `generate` does."""
        for first in range(0, len(prompts), slots):
            wanted = new_tokens[first : first + slots]
            for step, _ in enumerate(self.generate(prompts[first : first + slots], max(wanted))):
                yield sum(step < most for most in wanted)

    def _kept(self, cache: Any, point: tuple[int, int]) -> None:
        """Remember the bytes of the first point's cache; its warm-up is shorter."""
        if point == self._first_point:
            held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
            self._cache_bytes = max(self._cache_bytes, sum(t.numel() * t.element_size() for t in held))

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt, one prompt after the other."""
        torch = self._torch
        from transformers import DynamicCache

        answers = []
        with torch.inference_mode():
            for ids, most in zip(prompts, new_tokens, strict=True):
                cache = DynamicCache(config=self._model.config)
                inputs, answer = torch.tensor([ids], device=self._device), list[int]()
                while len(answer) < most:
                    output = self._model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    inputs = output.logits[:, -1].argmax(dim=-1, keepdim=True)
                    if int(inputs) in stop:
                        break
                    answer.append(int(inputs))
                answers.append(answer)
        return answers

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """The tokens of the checkpoint's own tokenizer."""
        from workbench.worker.tokens.spelling import checkpoint_spelling

        return checkpoint_spelling(self._path, ids)

    def memory(self) -> dict[str, int]:
        """Bytes of parameters and buffers; on a GPU the allocator's peaks too."""
        sizes = {"weights": int(self._model.get_memory_footprint()), "kv_cache": self._cache_bytes}
        if self._device == "cuda":
            cuda = self._torch.cuda
            sizes["workspace"] = max(0, int(cuda.max_memory_allocated()) - sizes["weights"] - self._cache_bytes)
            sizes["allocated_peak"] = int(cuda.max_memory_allocated())
            sizes["reserved_peak"] = int(cuda.max_memory_reserved())
        return sizes

    def settings(self) -> dict[str, Any]:
        """Device, dtype, threads, and what became of the format."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        settings = {"device": self._device, "dtype": dtype, "threads": self._torch.get_num_threads()}
        if self._scored_in:
            settings["scored_logits"] = self._scored_in
        if self._device == "cuda":
            settings["device_name"] = self._torch.cuda.get_device_name()
        if self._format in packed.FORMATS:
            settings |= self._packed or {"kernel": self._kernel()}
        if self._packed and self._device == "cpu":
            settings["warnings"] = ["packed weights through the plain reference: their size is real, the speed is not"]
        elif self._format == "gguf" and not self._packed:
            settings["warnings"] = [
                f"GGUF de-quantized to {dtype} at load: size in memory and speed are those of {dtype}"
            ]
        return settings

    def _kernel(self) -> str:
        """What computes where `kernels/` does not; GPTQModel chooses a class of layer for the machine."""
        if self._format == "gguf":
            return "none, de-quantized"
        chosen = {type(module).__name__ for module in self._model.modules() if "qweight" in module._buffers}
        return " ".join(["gptqmodel", *sorted(chosen)])

    def close(self) -> None:
        """Drop the model."""
        del self._model
