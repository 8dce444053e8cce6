"""llama.cpp through the low-level calls of llama-cpp-python.

The binding's own `Llama.eval` copies all logits after every token and loses up to a third of the decoding
speed; here one batch is reused and `llama_decode` is called directly. Logits are read in place, as a tensor
wrapped around llama.cpp's output buffer.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workbench.records import Artifact, Job, Quality, Row, from_json
from workbench.shape import SCORE_CHUNK_BYTES, EngineMemory, Sequences, Shape, Stored
from workbench.worker.base.gguf_file import parts_of
from workbench.worker.ggml import model
from workbench.worker.ggml.index import entries
from workbench.worker.ggml.mixtures import tensor_bytes
from workbench.worker.scoring.reducer import Scoring

WORD = "llama.cpp"
MODULE = "llama_cpp"
PACKAGES: tuple[str, ...] = ("llama-cpp-python",)
INSTALL = "pip install llama-cpp-python"
LOADS: tuple[str, ...] = ("gguf",)
AXES: tuple[str, ...] = ("kv_cache",)
MAKES_REFERENCE = False
# Every large buffer in a mapping of its own, at the same place in its first page. 128 KiB is where glibc begins, but it
# raises that with what is freed, up to 32 MiB; and where a buffer lies is worth 4 % of a prefill or of a step. That
# would be the process's history, not the variant. With 1 MiB the buffer of the quantized activations is still left out.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
UBATCH_TOKENS = 512
"""Tokens that are computed at once."""
MOST_SEQUENCES = 256
"""`LLAMA_MAX_SEQ` of llama.cpp."""
LOG_WARNING = 3

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}
"""Bytes a value of the KV cache."""
REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})
"""Types that are copied into another layout on an x86 processor with AVX-512 (`ggml-cpu/repack.cpp`)."""
RUNTIME_BYTES = 285e6
"""Measured: llama-cpp-python 0.3.36, CPython 3.11, x86-64."""


@dataclass(frozen=True)
class Options:
    """llama.cpp, by llama-cpp-python."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    threads: int | None = field(default=None, metadata={"ge": 1, "le": 1024})
    """Threads of the processor (default: all that the program may use)."""
    gpu_layers: int = field(default=-1, metadata={"ge": -1, "le": 9999})
    """Decoder layers on the GPU, where the build has one; -1: all."""
    flash_attention: bool | None = None
    """Compute attention without storing its scores (default: as llama.cpp decides)."""
    mmap: bool = True
    """Map the file into memory; `false`: read it."""
    kv_cache: Literal["f16", "q8_0"] | None = None
    """What keys and values are stored as (default f16)."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """llama.cpp reads GGUF only; the base has a GGUF form of its own."""
    if artifact.format in LOADS:
        return None
    return f"llama.cpp reads GGUF files only, not {artifact.format} checkpoints"


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """Every option can be had everywhere."""
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """A processor's weights are the mapped file, and a second copy of what is repacked. The graph's buffer is as wide
    as its widest step for a micro-batch: the logits, or the MLP. A processor touches no more of it than it uses."""
    cache = shape.cached_values * model.context_of(load.tokens) * load.batch * KV_BYTES[options.kv_cache or "f16"]
    width = min(UBATCH_TOKENS, max(load.widest_tokens, load.batch))
    logits = max(load.scored_tokens, load.batch) * shape.vocab_size * 4.0
    if cuda:
        widest = max(shape.vocab_size + shape.hidden, 2 * shape.inner + 3 * shape.hidden)
        return EngineMemory(stored.disk_bytes, cache, width * widest * 4 + logits, RUNTIME_BYTES)
    repacked = sum(
        tensor_bytes(stored.types[t.name], t)
        for t in shape.tensors
        if stored.types[t.name] in REPACKED and len(t.shape) == 2 and t.shape[0] % 8 == 0 and t.layer is not None
    )
    touched = max(logits + width * shape.hidden * 4, width * (2 * shape.inner + 3 * shape.hidden) * 4)
    workspace = touched + logits + SCORE_CHUNK_BYTES
    return EngineMemory(stored.disk_bytes + repacked, cache, workspace, RUNTIME_BYTES)


def serving_command(path: str, row: Row) -> list[str] | None:
    """llama.cpp's own server: the binding's answers one request at a time, and copies all logits at every token."""
    options, load = row.options, row.workload
    slots, tokens = max(load.batches), max(load.most_tokens, row.longest_window)
    words = ["llama-server", "--model", path, "--ctx-size", str(tokens), "--parallel", str(slots)]
    if slots * load.longest > tokens:
        # Long prompts and many sequences were not measured together: one room for all, and whoever needs it.
        words += ["--kv-unified"]
    threads = (row.measurement.settings if row.measurement else options).get("threads")
    if isinstance(threads, int) and (row.device == "cpu" or options.get("threads")):
        words += ["--threads", str(threads)]
    layers = options.get("gpu_layers")
    if isinstance(layers, int) and (layers >= 0 or row.device != "cpu"):
        # -1 means all layers to the binding; the server counts them.
        words += ["--n-gpu-layers", str(layers if layers >= 0 else 999)]
    if options.get("kv_cache"):
        words += ["--cache-type-k", str(options["kv_cache"]), "--cache-type-v", str(options["kv_cache"])]
    if options.get("flash_attention") is not None:
        words += ["--flash-attn", "on" if options["flash_attention"] else "off"]
    if options.get("mmap") is False:
        words += ["--load-mode", "none"]
    return [*words, "--host", "127.0.0.1", "--port", "8000"]


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`."""
    return bool(load_engine().llama_supports_gpu_offload())


def load_engine() -> Any:
    """The `llama_cpp` module, its log silenced but for warnings."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    return llama_cpp


def _listen(api: Any, heard: list[str]) -> Any:
    """Let llama.cpp's log pass on to the worker's, and keep its lines on buffers and errors."""

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, user: object) -> None:
        line = text.decode(errors="replace")
        if "buffer size" in line or level >= LOG_WARNING:
            heard.append(line.strip())
            sys.stderr.write(line)

    api.llama_log_set(listen, ctypes.c_void_p(0))
    return listen


class Engine:
    """One model and one context; see `backends/__init__.py` for the contract."""

    continuous = True

    def __init__(self, job: Job) -> None:
        self._api = api = load_engine()
        # The binding's own makes a pointer object each time, which is slow in caches that a step has just emptied.
        address = ctypes.cast(api.llama_get_logits, ctypes.c_void_p).value
        self._get_logits = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address or 0)
        self._options: Options = from_json(Options, job.options)
        self._path, load = job.artifact.path, job.workload
        options = self._options
        self._threads = options.threads or len(os.sched_getaffinity(0))
        self._heard: list[str] = []
        self._listener = _listen(api, self._heard)

        params = api.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP if options.mmap else api.LLAMA_LOAD_MODE_NONE
        self._model, original = model.load(api, job, params, self._heard)
        self._warnings = model.warnings(api, self._model, job, original)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._kv_cache = options.kv_cache or "f16"
        self._context: Any = None
        self._batch: Any = None
        self._slots = self._room = 0
        self._seen = (0, 0)
        self._view: Any = None
        prompt_tokens, batch = load.points[0]
        generated = prompt_tokens + load.new_tokens - 1  # the last one is chosen, never fed
        self._first_point, self._point_lines = (batch, generated), list[str]()
        if job.longest_window:
            # Scored before anything is timed; with single sequences one context does for both.
            self.prepare(1, max(job.longest_window, generated if batch == 1 else 0))
        else:
            self.prepare(batch, generated)

    def prepare(self, batch: int, tokens: int) -> None:
        """A context for so many sequences of so many tokens that are fed, unless there is one."""
        if self._context and self._slots == batch and self._room >= tokens:
            return
        api = self._api
        self._drop_context()
        began = len(self._heard)
        context = api.llama_context_default_params()
        # Each sequence's share is rounded up by llama.cpp itself.
        context.n_ctx = batch * tokens
        context.n_batch = max(batch * tokens, UBATCH_TOKENS)
        context.n_ubatch = UBATCH_TOKENS
        context.n_seq_max = batch
        context.n_threads = context.n_threads_batch = self._threads
        if self._kv_cache == "q8_0":
            context.type_k = context.type_v = api.GGML_TYPE_Q8_0
        if self._options.flash_attention is not None:
            context.flash_attn_type = int(self._options.flash_attention)
        self._context = api.llama_init_from_model(self._model, context)
        if not self._context:
            words = model.last_words(self._heard)
            raise RuntimeError(f"llama.cpp could not make a context for {batch} x {tokens} tokens{words}")
        self._slots, self._room = batch, tokens
        if (batch, tokens) == self._first_point or not self._point_lines:
            self._point_lines = self._heard[began:]
        self._batch = api.llama_batch_init(context.n_batch, 0, batch)

    def _drop_context(self) -> None:
        if self._context:
            self._api.llama_batch_free(self._batch)
            self._api.llama_free(self._context)
            self._context = None

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
        self._run()

    def _run(self) -> None:
        status = self._api.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}{model.last_words(self._heard)}")

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def _rows(self, rows: int) -> Any:
        """The last decode's wanted logits, [rows, vocabulary] float32, a numpy view of the engine's buffer."""
        import numpy as np

        seen = (self._get_logits(self._context), rows)
        if self._seen != seen:
            # llama.cpp keeps its buffer from step to step, and a view takes longer to make than the choice of a token.
            size = rows * self._vocab_size
            buffer = (ctypes.c_float * size).from_address(seen[0])
            self._view = np.frombuffer(buffer, dtype=np.float32).reshape(rows, self._vocab_size)
            self._seen = seen
        return self._view

    def _logits(self, rows: int) -> Any:
        """The same as a tensor."""
        import torch

        return torch.from_numpy(self._rows(rows))

    def _likeliest(self, rows: int) -> list[int]:
        """The id that each wanted row gives the highest logit.

        By numpy, in one thread: torch would wake threads of its own beside llama.cpp's, which still spin.
        """
        chosen: list[int] = self._rows(rows).argmax(axis=1).tolist()
        return chosen

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """Reduce each window's logits from its first scored position on."""
        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            progress(index)
            self.prepare(1, len(ids))
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
        chosen, gained = self._likeliest(count), [1] * count
        yield gained
        lengths = [len(ids) for ids in prompts]
        # Each look at one of the batch's pointers makes a new pointer object.
        token_at, position_at = self._batch.token, self._batch.pos
        for step in range(new_tokens - 1):
            if step == 0:
                self._decode([(chosen[s], lengths[s], s, True) for s in range(count)])
            else:
                # All else in the batch is as it was: between two steps as little as can be.
                for s, token in enumerate(chosen):
                    token_at[s] = token
                    position_at[s] = lengths[s] + step
                self._run()
            chosen = self._likeliest(count)
            yield gained

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt, one prompt after the other."""
        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            self.prepare(1, len(ids) + most - 1)
            self._forget()
            self._decode([(token, i, 0, i == len(ids) - 1) for i, token in enumerate(ids)])
            answer: list[int] = []
            while (token := self._likeliest(1)[0]) not in stop:
                answer.append(token)
                if len(answer) == most:
                    break
                self._decode([(token, len(ids) + len(answer) - 1, 0, True)])
            answers.append(answer)
        return answers

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Continuous batching: a step decodes one token of every sequence and the prompts that found a free slot."""
        self._forget()
        memory = self._api.llama_get_memory(self._context)
        free, waiting = list(range(slots)), list(range(len(prompts)))
        left, position, last = dict[int, int](), dict[int, int](), dict[int, int]()
        while waiting or left:
            batch = [(last[slot], position[slot], slot, True) for slot in left]
            while waiting and free:
                slot, request = free.pop(), waiting.pop(0)
                ids = prompts[request]
                batch += [(token, i, slot, i == len(ids) - 1) for i, token in enumerate(ids)]
                left[slot], position[slot] = new_tokens[request], len(ids) - 1
            order = list(left)
            self._decode(batch)
            chosen = self._likeliest(len(order))
            for slot, token in zip(order, chosen, strict=True):
                last[slot], position[slot], left[slot] = token, position[slot] + 1, left[slot] - 1
                if not left[slot]:
                    del left[slot]
                    free.append(slot)
                    self._api.llama_memory_seq_rm(memory, slot, -1, -1)
            yield len(order)

    def spell(self, ids: list[int]) -> list[str | None]:
        """The tokens of a GGUF file's own vocabulary."""
        vocabulary = self._api.llama_model_get_vocab(self._model)
        texts = [
            self._api.llama_vocab_get_text(vocabulary, token) if token < self._vocab_size else None for token in ids
        ]
        return [None if text is None else text.decode(errors="replace") for text in texts]

    def memory(self) -> dict[str, int]:
        """Bytes of the weights as llama.cpp counts them, and of the buffers that it said it made for the first point.

        `weights_copied`: weights in another layout beside the mapped file; `workspace`: the graph's buffers.
        """
        parts = map(str, parts_of(Path(self._path)))
        stored = {entry.name: entry.size_bytes for part in parts for entry in entries(part)}
        sizes = {"weights": int(self._api.llama_model_size(self._model))}
        # Without a head of its own the embedding is the head.
        sizes["embedding"] = stored.get("token_embd.weight", 0) if "output.weight" in stored else 0
        kinds = {"KV": "kv_cache", "compute": "workspace", "output": "workspace"}
        loaded = [line for line in self._heard if " model buffer" in line]
        for line in (*loaded, *self._point_lines):
            found = re.search(r"(\S+)\s+(model|KV|compute|output)\s+buffer size\s+=\s+([\d.]+) MiB", line)
            if not found:
                continue
            place, what, size_bytes = found[1], found[2], float(found[3]) * 2**20
            if what == "model" and "REPACK" in place:
                sizes["weights_copied"] = sizes.get("weights_copied", 0) + int(size_bytes)
            elif what != "model":
                sizes[kinds[what]] = sizes.get(kinds[what], 0) + int(size_bytes)
        return sizes

    def settings(self) -> dict[str, object]:
        """Threads, and what the build can use."""
        words = self._api.llama_print_system_info().decode().replace("|", " ").split()
        features = [
            name for name, sign, on in zip(words, words[1:], words[2:], strict=False) if sign == "=" and on == "1"
        ]
        cuda = bool(self._api.llama_supports_gpu_offload())
        return {
            "threads": self._threads,
            "device": "cuda" if cuda else "cpu",
            "kv_cache": self._kv_cache,
            "features": features,
            "warnings": self._warnings,
        }
