"""How much room vLLM is told to make: for sequences, and for their keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from workbench.records import Job, Workload
from workbench.worker.architectures import Sizes, sizes_of
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import text_config

BLOCK_TOKENS = 16
MARGIN = 1.25
"""Head room over the tokens a workload needs, for block rounding and one extra sequence."""


def room(load: Workload, longest_window: int) -> dict[str, int]:
    """What the engine is told of the sequences to come, by its own names."""
    longest = max(load.longest, longest_window)
    at_once = max(batch * prompt_tokens for prompt_tokens, batch in load.points)
    return {
        "max_model_len": longest,
        "max_num_seqs": max(load.batches),
        "max_num_batched_tokens": max(at_once, longest),
    }


def in_blocks(tokens: int) -> int:
    """The tokens that a sequence of so many takes room for."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def values_per_token(path: str) -> int:
    """Keys and values of one token over all layers, by the shape in the checkpoint's config.json."""
    sizes = _sizes(path)
    return 2 * sizes.layers * sizes.axes["keys"]


def devices(options: Mapping[str, object]) -> int:
    """How many GPUs share the model."""
    found = options.get("tensor_parallel")
    return found if isinstance(found, int) and found > 0 else 1


def reserved_bytes(job: Job, path: str, dtype: str, cpu: bool) -> int:
    """Bytes of keys and values to reserve on each device for all that a job asks: by blocks of 128, and some more.

    On a processor a value has room for 32 bits, for its kernels lay blocks out as they want them. Devices share heads,
    and have one each at the least.
    """
    load = job.workload
    tokens = max(load.most_tokens, load.longest, job.longest_window + 1)
    blocks = -(-tokens // 128) + 2 * max(load.batches)
    width = 4 if cpu or dtype == "float32" else 1 if job.options.get("kv_cache") == "fp8" else 2
    shared = min(devices(job.options), _sizes(path).kv_heads)
    return int(blocks * 128 * values_per_token(path) * width * MARGIN / shared)


def _sizes(path: str) -> Sizes:
    return sizes_of(text_config(read_json(Path(path) / "config.json")))
