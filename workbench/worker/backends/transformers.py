"""transformers: safetensors as they are, AWQ and GPTQ through its quantizers, GGUF and compressed-tensors de-quantized
at load; bitsandbytes and torchao quantize the base while it loads.

With `kernel: workbench` AWQ, GPTQ and GGUF stay packed instead (`packed.py`).

Decoding is a plain greedy loop over `model(...)` with a key-value cache; on a GPU its step is a CUDA graph where the
model allows it (`graphs.py`), and the row says which. `generate()` does the same and adds stopping criteria and
processors that differ between models; the loop is what all of them share.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workbench.errors import install_with
from workbench.records import Artifact, Job, Quality, Row, from_json
from workbench.shape import DTYPE_BYTES, SCORE_CHUNK_BYTES, EngineMemory, Sequences, Shape, Stored
from workbench.worker.attention import caps_scores
from workbench.worker.backends import from_files, gptqmodel_kernels, graphs, packed, packed_experts, serve_in_groups
from workbench.worker.base.checkpoint import read_json
from workbench.worker.methods.loading import ON_LOAD, held_bytes
from workbench.worker.scoring.reducer import Scoring

WORD = "Transformers"
MODULE = "transformers"
PACKAGES: tuple[str, ...] = ("transformers", "torch")
INSTALL = "pip install transformers accelerate"
LOADS: tuple[str, ...] = ("safetensors", "awq", "gptq", "gguf", "compressed-tensors", "whole", *ON_LOAD)
AXES: tuple[str, ...] = ("kv_cache",)
MAKES_REFERENCE = True
# GPTQModel sizes its worker pools by the cores and refuses to start on two (facts of version 7.6).
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "4"}

RUNTIME_BYTES = {"awq": 735e6, "gptq": 895e6, "whole": 895e6, **dict.fromkeys(ON_LOAD, 560e6)}
PLAIN_RUNTIME_BYTES = 480e6
"""By format: AWQ and GPTQ bring GPTQModel and its layers. Measured: transformers 5.19 and torch 2.13 (CPU), CPython
3.11, x86-64."""
READER_BYTES = 94e6
"""Beside a GGUF file itself, in a process on a CPU (`benchmarks/plan_vs_measured.py`)."""

DEQUANTIZED = {
    "gguf": "a GGUF is de-quantized when transformers loads it",
    "compressed-tensors": "compressed-tensors are de-quantized when transformers loads them",
}
CAPPED = ("gemma2",)
"""Types whose scores of attention are capped, which only attention step by step does (`worker/attention.py`)."""


@dataclass(frozen=True)
class Options:
    """Hugging Face transformers, by PyTorch."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in. `auto`: the checkpoint's own on a GPU; on a CPU float32, but for AWQ, GPTQ, bitsandbytes and
    torchao, whose kernels there compute in bfloat16."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; `auto`: on the GPU if there is one."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """PyTorch's fused attention (`sdpa`, where the model's code has it; Bloom's has not), or step by step. Models that
    cap scores (Gemma 2) are always computed step by step: the fused one leaves the cap out."""
    kv_cache: Literal["auto"] | None = None
    """What keys and values are stored as: the model's dtype. (Its quantized caches need a library more, and
    de-quantize at every step.)"""
    kernel: Literal["auto", "workbench", "gptqmodel"] = "auto"
    """What computes with AWQ, GPTQ and GGUF weights. `workbench`: they stay packed (`kernels/`), on a CPU slowly.
    `gptqmodel`: AWQ and GPTQ by that package; a GGUF, which it does not read, is de-quantized. `auto`: `gptqmodel`,
    until the kernels have been measured on a GPU."""
    threads: int | None = field(default=None, metadata={"ge": 1, "le": 1024})
    """Threads of the processor (default: all that the program may use)."""
    trust_remote_code: bool = False
    """Let Python code that comes with the model run."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """Every format of ours can be loaded, but for AWQ's and GPTQ's experts."""
    if artifact.format not in LOADS:
        return f"transformers does not read {artifact.format}"
    if artifact.format in ("awq", "gptq") and packed_experts(artifact):
        return "transformers has a layer's experts as one tensor, and would draw at random what is packed one by one"
    return None


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """Every option can be had everywhere."""
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """A layer's activations of a whole prompt, or the scored logits; a GGUF has the weights of the dtype it becomes."""
    quantized, on_gpu = form in RUNTIME_BYTES, cuda and options.device != "cpu"
    by_itself = DTYPE_BYTES[shape.dtype] if on_gpu else 4
    computed = by_itself if options.dtype == "auto" else DTYPE_BYTES[options.dtype]
    width = (2 if cuda else 4) if quantized else computed
    activations = load.widest_tokens * (3 * shape.inner + 4 * shape.hidden) * width
    logits = load.scored_tokens * shape.vocab_size * (width + 4.0)
    # Step by step, attention has the scores of all pairs of tokens, and their softmax in float32.
    by_steps = options.attention == "eager" or shape.traits.model_type in CAPPED
    pairs = max(load.batch * load.prompt_tokens**2, load.window**2) if by_steps else 0
    scores = shape.traits.heads * pairs * (width + 4.0)
    # The file stays mapped while its weights are de-quantized from it, and what reads it is loaded.
    mapped = stored.disk_bytes + READER_BYTES if form == "gguf" and not on_gpu else 0.0
    return EngineMemory(
        weights=stored.disk_bytes if quantized else shape.parameters * computed,
        # AWQ and GPTQ are computed in 16 bits everywhere.
        kv_cache=shape.cached_values * load.tokens * load.batch * (2.0 if quantized else computed),
        workspace=max(activations + scores, logits) + SCORE_CHUNK_BYTES,
        runtime=RUNTIME_BYTES.get(form, PLAIN_RUNTIME_BYTES) + mapped,
        notes=(DEQUANTIZED[form],) if form in DEQUANTIZED else (),
    )


def serving_command(path: str, row: Row) -> list[str] | None:
    """Its own server, which takes any context. It has no kernels for weights that were left packed, and would serve the
    base of what is quantized as it loads."""
    options = row.options
    if row.artifact.format in ("gguf", *ON_LOAD) or options.get("kernel") == "workbench":
        return None
    words = ["transformers", "serve", path]
    settings = row.measurement.settings if row.measurement else options
    dtype = settings.get("dtype")
    words += ["--dtype", str(dtype)] if dtype else []
    words += ["--device", "cpu"] if row.device == "cpu" else []
    attention = settings.get("attention", options.get("attention"))
    words += ["--attn-implementation", "eager"] if attention == "eager" else []
    words += ["--trust-remote-code"] if options.get("trust_remote_code") else []
    return [*words, "--host", "127.0.0.1", "--port", "8000"]


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`."""
    import torch

    return bool(torch.cuda.is_available())


def load_engine() -> Any:
    """torch and transformers."""
    # GPTQModel sets this when it is imported, so that AWQ and GPTQ would run on another allocator than the base.
    own = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "expandable_segments:False"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", own)
    import torch
    import transformers  # noqa: F401

    return torch


def compile_for(job: Job) -> None:
    """Compile GPTQModel's kernels where a job will use them on a GPU."""
    options: Options = from_json(Options, job.options)
    by_it = job.artifact.format in ("awq", "gptq") and options.kernel != "workbench" and options.device != "cpu"
    if by_it and load_engine().cuda.is_available():
        said = read_json(Path(job.artifact.path) / "config.json")["quantization_config"]
        gptqmodel_kernels.ready(int(said["bits"]))


def _held_bytes(layer: Any) -> int:
    """Bytes that a layer of a cache keeps: keys and values, and what linear attention and convolutions carry along."""
    kept = [each for one in vars(layer).values() for each in (one.values() if isinstance(one, dict) else [one])]
    return sum(each.nbytes for each in kept if hasattr(each, "nbytes") and each.is_floating_point())


def _attention(options: Options) -> str | None:
    """As transformers takes it: by its name it insists on sdpa, without it takes it where there is one."""
    return None if options.attention == "sdpa" else options.attention


def _weights(module: Any) -> list[Any]:
    return [*module.parameters(), *module.buffers()] if module is not None else []


class Engine:
    """One model; see `backends/__init__.py` for the contract."""

    continuous = False

    def __init__(self, job: Job) -> None:
        torch = self._torch = load_engine()
        options: Options = from_json(Options, job.options)
        artifact = job.artifact
        self._device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
        if options.device == "cuda" and self._device != "cuda":
            raise install_with("A CUDA build of torch, or a GPU,", "pip install torch (CUDA build)")
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
        self._format, self._scored_in, self._path = artifact.format, "", artifact.path
        self._first_point, self._cache_bytes, self._largest_cache = job.workload.points[0], 0, 0
        self._packed: dict[str, object] = {}
        self._steps: graphs.Steps | None = None
        self._decoding = ""
        path = Path(artifact.path)
        if options.kernel == "workbench" and artifact.format in packed.PACKED_FORMATS:
            self._load_packed(path, options)
        else:
            more = options.dtype, _attention(options), options.trust_remote_code
            self._model = from_files.load(artifact, self._device, *more)
        self._capped = caps_scores(self._model.config)
        if self._capped:
            self._model.set_attn_implementation("eager")

    def _load_packed(self, path: Path, options: Options) -> None:
        """By `kernels/`; float32 on a CPU, where the reference computes."""
        by_itself = "float32" if self._device == "cpu" else None
        loaded = packed.load(
            path,
            self._format,
            dtype=by_itself if options.dtype == "auto" else options.dtype,
            device=self._device,
            attention=_attention(options),
            trust_remote_code=options.trust_remote_code,
        )
        self._model = loaded.model
        self._packed = {"kernel": "workbench", "packed": loaded.packed, "unpacked": loaded.dense}

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """One forward a window; the head runs only on the positions that are scored."""
        from workbench.worker.scoring import head
        from workbench.worker.scoring.reducer import Reducer

        torch, reducer = self._torch, Reducer(asked)
        with torch.inference_mode(), head.in_float32(self._model) as widened:
            for index, ids, first in asked.windows:
                progress(index)
                inputs = torch.tensor([ids], device=self._device)
                keep = len(ids) - first
                logits = self._model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[0]
                reducer(index, first, logits)
        self._scored_in = "float32" if widened else str(logits.dtype).removeprefix("torch.")
        return reducer.result()

    def prepare(self, batch: int, tokens: int) -> None:
        """On a GPU capture the decoding step for so many sequences of so many tokens."""
        if self._device != "cuda" or (self._steps and self._steps.size == (batch, tokens)):
            return
        self._steps = None
        try:
            self._steps = graphs.Steps(self._model, batch, tokens)
            self._decoding = self._decoding or "CUDA graph over a static cache"
        except Exception as error:  # A model's own code may do anything; launched by Python it works all the same.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._decoding = f"launched by Python: {reason[:200]}"

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Greedy decoding of prompts of one length together; yields [1, 1, ...] after each step."""
        if self._steps and self._steps.fits(len(prompts), len(prompts[0]) + new_tokens - 1):
            yield from self._replayed(self._steps, prompts, new_tokens)
            return
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

    def _replayed(self, steps: graphs.Steps, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        torch = self._torch
        with torch.inference_mode():
            steps.prefill(torch.tensor(prompts, device=self._device))
            for step in range(new_tokens):
                if step:
                    steps.step()
                if self._device == "cuda":
                    torch.cuda.synchronize()
                yield [1] * len(prompts)
            self._kept(steps.cache, (len(prompts[0]), len(prompts)))

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Groups of `slots` prompts one after the other, each until its longest answer is done: as `generate` does."""
        return serve_in_groups(self.generate, prompts, new_tokens, slots)

    def _kept(self, cache: Any, point: tuple[int, int]) -> None:
        """Remember the bytes of the first point's cache, whose warm-up is shorter, and those of the largest."""
        held = sum(_held_bytes(layer) for layer in cache.layers)
        self._largest_cache = max(self._largest_cache, held)
        if point == self._first_point:
            self._cache_bytes = max(self._cache_bytes, held)

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

    def forget_peak(self) -> None:
        """On a GPU; on a CPU the process is asked."""
        if self._device == "cuda":
            self._torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int]:
        """Bytes of parameters and buffers; on a GPU the allocator's peaks too, of what came after `forget_peak`."""
        sizes = {"weights": held_bytes(self._model), "kv_cache": self._cache_bytes}
        with contextlib.suppress(NotImplementedError):  # A model with code of its own may not say where it is.
            head = {tensor.data_ptr() for tensor in _weights(self._model.get_output_embeddings())}
            looked_up = _weights(self._model.get_input_embeddings())
            sizes["embedding"] = sum(tensor.nbytes for tensor in looked_up if tensor.data_ptr() not in head)
        if self._device == "cuda":
            sizes["allocated_peak"] = int(self._torch.cuda.max_memory_allocated())
            sizes["reserved_peak"] = int(self._torch.cuda.max_memory_reserved())
            sizes["workspace"] = max(0, sizes["allocated_peak"] - sizes["weights"] - self._largest_cache)
        return sizes

    def settings(self) -> dict[str, object]:
        """Device, dtype, threads, and what became of the format."""
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        settings = {"device": self._device, "dtype": dtype, "threads": self._torch.get_num_threads()}
        if self._capped:
            settings["attention"] = "eager"
        if self._scored_in:
            settings["scored_logits"] = self._scored_in
        if self._device == "cuda":
            settings |= {"device_name": self._torch.cuda.get_device_name(), "decoding": self._decoding}
        if self._format in packed.PACKED_FORMATS:
            settings |= self._packed or {"kernel": self._kernel()}
        if self._packed and self._device == "cpu":
            settings["warnings"] = ["packed weights through the plain reference: their size is real, the speed is not"]
        elif self._format in DEQUANTIZED and not self._packed:
            settings["kernel"] = "none, de-quantized"
            name = "GGUF" if self._format == "gguf" else self._format
            settings["warnings"] = [
                f"{name} de-quantized to {dtype} at load: size in memory and speed are those of {dtype}"
            ]
        elif self._format in ON_LOAD:
            settings["warnings"] = [
                f"quantized by {self._format} as the base is loaded: the size on disk is the base's"
            ]
        elif self._device == "cuda" and self._format in ("awq", "gptq") and not self._packed:
            slow = gptqmodel_kernels.why_slow(self._kernel().removeprefix("gptqmodel").strip())
            settings["warnings"] = [slow] if slow else []
        return settings

    def _kernel(self) -> str:
        """What computes where `kernels/` does not; GPTQModel chooses a class of layer for the machine."""
        chosen = {type(module).__name__ for module in self._model.modules() if "qweight" in module._buffers}
        return " ".join(["gptqmodel", *sorted(chosen)])
