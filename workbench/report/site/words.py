"""What a reader sees instead of a recipe's or a row's names."""

from __future__ import annotations

from workbench.report.table import Line, Table
from workbench.worker.backends import BACKENDS, backend_named

MEMORY_PARTS = {
    "weights": "weights",
    "weights_copied": "weights repacked beside them",
    "kv_cache": "KV cache",
    "kv_cache_reserved": "KV cache as reserved",
    "workspace": "workspace",
    "runtime": "the program before it loads the model",
    "peak_rss": "peak seen on the host",
    "peak_vram": "peak seen on the GPU",
}


def engine_word(backend: str) -> str:
    """The engine's own name; what is none of ours (a server that somebody else started) has its row's."""
    return backend_named(backend).WORD if backend in BACKENDS else backend


def variant_name(table: Table, line: Line) -> str:
    """The variant, and what tells a line from another of its variant and engine."""
    row = line.row
    columns = table.telling[row.artifact.variant, row.backend]
    return " · ".join(filter(None, [row.artifact.variant, *(column.text(row) for column in columns)]))


def full_name(table: Table, line: Line) -> str:
    """The same with its engine."""
    return f"{variant_name(table, line)} on {engine_word(line.row.backend)}"
