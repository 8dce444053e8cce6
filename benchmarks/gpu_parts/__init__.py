"""The parts of `gpu_check.py`, a file each: `find(place)` yields what a part finds, within `LIMIT_S` seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Place:
    """Where and how large the parts work; tests take the CPU and small sizes."""

    work: Path
    """An empty folder."""
    results: Path
    device: str = "cuda"
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    """(out, in): the linear layers of Llama-3.1-8B."""
    checked: tuple[tuple[str, int], ...] = (("decode", 1), ("prefill", 16), ("dense", 300))
    """Ways to multiply, and how many rows of x each is checked with."""
    engines: tuple[str, ...] = ("transformers", "vllm", "llamacpp")
    """Those of them that are here are used."""
    processes: int = 8
    layer: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            # For the layers alone are timed, and a larger one takes time to make.
            "vocab_size": 4096,
        }
    )
    calibration_windows: tuple[int, int] = (128, 512)
    """How many, and tokens in each."""


@dataclass(frozen=True)
class Finding:
    """A line of the table. `holds`: None where nothing is asked for, or it could not be measured here."""

    what: str
    found: str
    goal: str = ""
    holds: bool | None = None
    values: dict[str, object] = field(default_factory=dict)
    """Unrounded, for the row."""
