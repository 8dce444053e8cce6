"""MLX by mlx-lm's models: the base as it is, AWQ and GPTQ in MLX's own groups (`worker/mlx_folder.py`).

What people run it on is a Mac; on Linux it computes on the processor, right and slowly, and speeds there say nothing of
a Mac. The loop over the model is ours, since mlx-lm's generator knows no fixed number of tokens and no batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.records import Artifact, Job, Quality, Row, from_json
from workbench.shape import DTYPE_BYTES, SCORE_CHUNK_BYTES, EngineMemory, Sequences, Shape, Stored
from workbench.worker.backends import serve_in_groups
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.saving import for_both_readers
from workbench.worker.scoring.reducer import Scoring

WORD = "MLX"
MODULE = "mlx_lm"
PACKAGES: tuple[str, ...] = ("mlx", "mlx-lm")
INSTALL = "pip install 'mlx[cpu]' mlx-lm (on a Mac: pip install mlx-lm)"
LOADS: tuple[str, ...] = ("safetensors", "mlx")
AXES: tuple[str, ...] = ()
ENVIRONMENT: dict[str, str] = {}
MAKES_REFERENCE = False
BY_NAME = True
CACHE_STEP = 256
"""Tokens by which its cache grows."""
RUNTIME_BYTES = 450e6
"""Measured: mlx 0.32.4, mlx-lm 0.32.2 with transformers 5.19 and torch 2.13, CPython 3.11, x86-64."""


@dataclass(frozen=True)
class Options:
    """mlx-lm's models."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What it computes in; `auto`: the checkpoint's own on a Mac's GPU, float32 on a processor."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """It reads folders; of packed weights its own layout."""
    return None if artifact.format in LOADS else f"mlx-lm does not read {artifact.format}"


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """Every option can be had everywhere."""
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """As on a processor: a layer's activations of a whole prompt, or the logits of a window, all in one dtype."""
    width = 4 if options.dtype == "auto" else DTYPE_BYTES[options.dtype]
    tokens = -(-load.tokens // CACHE_STEP) * CACHE_STEP
    activations = load.widest_tokens * (3 * shape.inner + 4 * shape.hidden) * width
    logits = load.scored_tokens * shape.vocab_size * (width + 4.0)
    # Of what is stored in 16 bits most is the embedding.
    widened = (width - 2) * shape.vocab_size * shape.hidden
    weights = stored.disk_bytes + widened if form == "mlx" else shape.parameters * width
    cache = shape.cached_values * tokens * load.batch * width
    return EngineMemory(weights, cache, max(activations, logits) + SCORE_CHUNK_BYTES, RUNTIME_BYTES)


def serving_command(path: str, row: Row) -> list[str] | None:
    """mlx-lm's own server, which takes any context and computes in the checkpoint's own dtype alone."""
    if row.options.get("dtype") not in (None, "auto"):
        return None
    return ["mlx_lm.server", "--model", path, "--host", "127.0.0.1", "--port", "8000"]


def sees_cuda(payload: None, progress: object) -> bool:
    """Its builds for NVIDIA's GPUs are not driven by this program."""
    return False


def load_engine() -> Any:
    """`mlx.core`, and mlx-lm behind it."""
    import mlx.core
    import mlx_lm.utils  # noqa: F401

    return mlx.core


def logits_of(path: Path, ids: list[int]) -> Any:
    """[ids, vocabulary] float32 in torch, computed in float32: one thing to prove what was written by."""
    mx = load_engine()
    model, _ = _load(mx, path, "float32")
    return _to_torch(mx, model(mx.array([ids]))[0])


def _load(mx: Any, path: Path, dtype: str) -> tuple[Any, str]:
    """The model, and what it computes in. mlx-lm refuses tensors that are missing or too many."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    # It knows older names of some keys only, and has defaults where they are not.
    config = for_both_readers(read_json(path / "config.json"))
    model, _ = load_model(path, lazy=True, model_config=config)
    if dtype == "auto" and mx.default_device() == mx.Device(mx.cpu):
        dtype = "float32"
    if dtype != "auto":
        model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    leaves: Any = tree_flatten(model.parameters())
    kinds = {array.dtype for _, array in leaves if mx.issubdtype(array.dtype, mx.floating)}
    return model, " and ".join(sorted(str(kind).removeprefix("mlx.core.") for kind in kinds))


def _warnings(job: Job, cache: list[Any]) -> list[str]:
    """What mlx-lm computes otherwise than the model is."""
    longest = max(job.longest_window, job.workload.longest)
    if not 0 < job.sliding_window < longest or any(getattr(layer, "max_size", None) for layer in cache):
        return []
    return [
        f"mlx-lm leaves out the sliding window of {job.sliding_window:,} tokens that this model has: sequences of "
        f"{longest:,} are another model's here"
    ]


def _to_torch(mx: Any, logits: Any) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(logits.astype(mx.float32)))


class Engine:
    """One model; see `backends/__init__.py` for the contract."""

    continuous = False

    def __init__(self, job: Job) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self._mx, options = load_engine(), from_json(Options, job.options)
        self._path, self._first_point = job.artifact.path, job.workload.points[0]
        self._model, self._dtype = _load(self._mx, Path(self._path), options.dtype)
        self._cache_bytes = self._largest_cache = 0
        self._warnings = _warnings(job, make_prompt_cache(self._model))

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """One forward a window."""
        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            progress(index)
            logits = self._model(self._mx.array([ids]))[0, first:]
            reducer(index, first, _to_torch(self._mx, logits))
        return reducer.result()

    def _fed(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        """A cache of all but the last token of each prompt, and the last ones; the head runs on none of the others."""
        from mlx_lm.models.cache import make_prompt_cache

        tokens, cache = self._mx.array(prompts), make_prompt_cache(self._model)
        if tokens.shape[1] > 1:
            self._model(tokens[:, :-1], cache=cache)
            self._mx.eval([layer.state for layer in cache])
        return cache, tokens[:, -1:]

    def _next(self, inputs: Any, cache: Any) -> Any:
        """The likeliest token of each sequence, [sequences, 1]."""
        chosen = self._mx.argmax(self._model(inputs, cache=cache)[:, -1], axis=-1, keepdims=True)
        self._mx.eval(chosen)
        return chosen

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Greedy decoding of prompts of one length together; yields [1, 1, ...] after each step."""
        cache, inputs = self._fed(prompts)
        for _ in range(new_tokens):
            inputs = self._next(inputs, cache)
            yield [1] * len(prompts)
        held = sum(layer.nbytes for layer in cache)
        self._largest_cache = max(self._largest_cache, held)
        if (len(prompts[0]), len(prompts)) == self._first_point:
            self._cache_bytes = max(self._cache_bytes, held)

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Groups of `slots` prompts one after the other, each until its longest answer is done."""
        return serve_in_groups(self.generate, prompts, new_tokens, slots)

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt, one prompt after the other."""
        answers = []
        for ids, most in zip(prompts, new_tokens, strict=True):
            (cache, inputs), answer = self._fed([ids]), list[int]()
            while len(answer) < most:
                inputs = self._next(inputs, cache)
                if int(inputs.item()) in stop:
                    break
                answer.append(int(inputs.item()))
            answers.append(answer)
        return answers

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """The tokens of the folder's own tokenizer."""
        from workbench.worker.tokens.spelling import checkpoint_spelling

        return checkpoint_spelling(self._path, ids)

    def forget_peak(self) -> None:
        """MLX counts its own memory."""
        self._mx.reset_peak_memory()

    def memory(self) -> dict[str, int]:
        """Bytes of the weights as MLX holds them; the workspace is the rest of its own peak."""
        from mlx.utils import tree_flatten

        arrays = dict(tree_flatten(self._model.parameters()))
        weights = sum(array.nbytes for array in arrays.values())
        embedding = sum(array.nbytes for name, array in arrays.items() if ".embed_tokens." in name)
        untied = any(name.startswith("lm_head.") for name in arrays)
        workspace = max(0, self._mx.get_peak_memory() - weights - self._largest_cache)
        return {
            "weights": weights,
            "embedding": embedding if untied else 0,
            "kv_cache": self._cache_bytes,
            "workspace": workspace,
        }

    def settings(self) -> dict[str, object]:
        """Device and dtype."""
        device = "cpu" if self._mx.default_device() == self._mx.Device(self._mx.cpu) else "metal"
        return {"device": device, "dtype": self._dtype, "scored_logits": self._dtype, "warnings": self._warnings}
