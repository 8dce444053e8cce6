"""Tensors of a GGUF file of which its quantizer left hardly anything.

A block's scale is a float16 in every type. llama.cpp's quantizer rounds a scale that is too small for it to zero, and
all of the block with it, without a word; what reads such a tensor may be as large as it is small.
"""

from __future__ import annotations

from typing import Any

from workbench.shape import FLOATS
from workbench.worker.ggml.index import Entry, entries

SHARE = 0.5
"""Part of the power of its weights from which a tensor is said to be lost. Types of 1.6 bits lose 0.25."""
ROWS = 16
"""Rows of each tensor that are looked at, evenly spread."""


def warnings(source: str, made: str) -> list[str]:
    """In words, the tensors of a quantized file that lost more than `SHARE` of what they were in its source."""
    before = {entry.name: entry for entry in entries(source)}
    shares = {
        entry.name: _lost(_rows(source, before[entry.name]), _rows(made, entry))
        for entry in entries(made)
        if entry.kind not in FLOATS and entry.name in before
    }
    lost = [name for name, share in shares.items() if share > SHARE]
    if not lost:
        return []
    shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if lost[3:] else "")
    return [
        f"{len(lost)} of {len(shares)} tensors lose more than {SHARE:.0%} of their weights: {shown}. Their scales are "
        "beyond float16, which every GGUF type has for them; take BF16, AWQ or GPTQ"
    ]


def _rows(path: str, entry: Entry) -> Any:
    """Some rows of a tensor, float32."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    count = entry.shape[1] * entry.shape[2] * entry.shape[3]
    stored = np.memmap(path, np.uint8, "r", entry.offset, (count, entry.size_bytes // count))
    return dequantize(stored[:: -(-count // ROWS)].copy(), GGMLQuantizationType[entry.kind])


def _lost(before: Any, after: Any) -> float:
    whole = float((before.astype(float) ** 2).sum())
    return float(((before - after).astype(float) ** 2).sum()) / whole if whole else 0.0
