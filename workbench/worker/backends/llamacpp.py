"""llama.cpp through the low-level calls of llama-cpp-python.

The binding's own `Llama.eval` copies all logits after every token and loses up to a third of the decoding
speed; here one batch is reused and `llama_decode` is called directly. Logits are read in place, as a tensor
wrapped around llama.cpp's output buffer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from workbench.records import Artifact, Job

PACKAGES = ("llama-cpp-python",)
INSTALL = "pip install llama-cpp-python"
FORMATS = ("gguf",)
ENVIRONMENT: dict[str, str] = {}
UBATCH_TOKENS = 512


@dataclass(frozen=True)
class Options:
    """`threads`: default all this process may use; `gpu_layers`: -1 for all, where the build has a GPU."""

    __pydantic_config__ = {"extra": "forbid"}

    threads: int | None = None
    gpu_layers: int = -1
    flash_attention: bool | None = None
    mmap: bool = True


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """llama.cpp reads GGUF only; the base has a GGUF form of its own."""
    if artifact.format in FORMATS:
        return None
    return f"llama.cpp reads GGUF files only, not {artifact.format} checkpoints"


def load_engine() -> Any:
    """The `llama_cpp` module, its log silenced but for warnings."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    return llama_cpp


class Backend:
    """One model and one context; see `backends/__init__.py` for the contract."""

    def __init__(self, job: Job) -> None:
        self._api = api = load_engine()
        options, load, test = job.options, job.workload, job.evaluation
        self._threads = options.get("threads") or len(os.sched_getaffinity(0))
        generated = load.prompt_tokens + load.new_tokens
        context_tokens = max(load.batch * generated, test.window if test else 0)
        prompt_tokens = max(load.batch * load.prompt_tokens, test.window if test else 0)

        params = api.llama_model_default_params()
        params.n_gpu_layers = options.get("gpu_layers", -1)
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP if options.get("mmap", True) else api.LLAMA_LOAD_MODE_NONE
        self._model = api.llama_model_load_from_file(job.artifact.path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {job.artifact.path}")

        context = api.llama_context_default_params()
        context.n_ctx = context_tokens
        context.n_batch = max(prompt_tokens, UBATCH_TOKENS)
        context.n_ubatch = UBATCH_TOKENS
        context.n_seq_max = load.batch
        context.n_threads = context.n_threads_batch = self._threads
        if options.get("flash_attention") is not None:
            context.flash_attn_type = int(options["flash_attention"])
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {context_tokens} tokens")
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch = api.llama_batch_init(context.n_batch, 0, load.batch)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Run (id, position, sequence, wants logits) through the model."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def _logits(self, rows: int) -> Any:
        """The last decode's wanted logits, [rows, vocabulary] float32, a view of the engine's buffer."""
        import numpy as np
        import torch

        size = rows * self._vocab_size
        buffer = ctypes.cast(self._api.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float * size)).contents
        return torch.from_numpy(np.frombuffer(buffer, dtype=np.float32)).view(rows, self._vocab_size)

    def score(self, windows: list[tuple[int, list[int], int]], spec: dict[str, Any]) -> dict[str, Any]:
        """Reduce each window's logits from its first scored position on."""
        from workbench.worker.quality import Reducer

        reducer = Reducer(spec)
        for index, ids, first in windows:
            self._forget()
            last = len(ids) - 1
            self._decode([(token, i, 0, first <= i < last) for i, token in enumerate(ids)])
            reducer(index, first, self._logits(last - first))
        return reducer.result()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Greedy decoding of all prompts together; yields [1, 1, ...] after each step."""
        self._forget()
        count = len(prompts)
        self._decode(
            [
                (token, i, sequence, i == len(ids) - 1)
                for sequence, ids in enumerate(prompts)
                for i, token in enumerate(ids)
            ]
        )
        chosen = self._logits(count).argmax(dim=1).tolist()
        yield [1] * count
        for step in range(new_tokens - 1):
            self._decode([(chosen[s], len(prompts[s]) + step, s, True) for s in range(count)])
            chosen = self._logits(count).argmax(dim=1).tolist()
            yield [1] * count

    def memory(self) -> dict[str, int]:
        """Bytes of the weights as llama.cpp counts them."""
        return {"weights": int(self._api.llama_model_size(self._model))}

    def settings(self) -> dict[str, Any]:
        """Threads, and what the build can use."""
        words = self._api.llama_print_system_info().decode().replace("|", " ").split()
        features = [
            name for name, sign, on in zip(words, words[1:], words[2:], strict=False) if sign == "=" and on == "1"
        ]
        cuda = bool(self._api.llama_supports_gpu_offload())
        return {"threads": self._threads, "device": "cuda" if cuda else "cpu", "features": features}

    def close(self) -> None:
        """Free the context and the model."""
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
