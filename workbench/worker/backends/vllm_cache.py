"""How large vLLM's cache of keys and values is."""

from __future__ import annotations

from pathlib import Path

from workbench.records import Job
from workbench.worker.architectures import sizes_of
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import text_config

BLOCK_TOKENS = 16
MARGIN = 1.25
"""Head room over the tokens a workload needs, for block rounding and one extra sequence."""


def in_blocks(tokens: int) -> int:
    """The tokens that a sequence of so many takes room for."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def values_per_token(path: str) -> int:
    """Keys and values of one token over all layers, by the shape in the checkpoint's config.json."""
    sizes = sizes_of(text_config(read_json(Path(path) / "config.json")))
    return 2 * sizes.layers * sizes.axes["keys"]


def reserved_bytes(job: Job, path: str, tokens: int) -> int:
    """Bytes of keys and values to reserve for so many tokens: in 32 bits, by blocks of 128, and some more."""
    blocks = -(-tokens // 128) + 2 * max(job.workload.batches)
    return int(blocks * 128 * values_per_token(path) * 4 * MARGIN)
