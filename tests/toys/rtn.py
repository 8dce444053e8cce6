"""A toy method: every matrix of a decoder layer rounded to nearest, a scale a row.

`when: load` leaves the rounding to the engine, `when: never` forgets to write anything.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.shape import DTYPE_BYTES, Shape, Stored
from workbench.worker.methods import Making

SHORTHAND = "bits"
WRITES: tuple[str, ...] = ("rtn",)
LIBRARY = "toy"
TAGS: tuple[str, ...] = ("rtn", "8-bit")


@dataclass(frozen=True)
class Options:
    """`bits` a weight, stored as bytes."""

    __pydantic_config__ = {"extra": "forbid"}

    bits: Literal[4, 8] = 8
    when: Literal["now", "load", "never"] = "now"


def default_name(options: Options) -> str:
    """`rtn-8bit`."""
    return f"rtn-{options.bits}bit" + ("" if options.when == "now" else f"-{options.when}")


def check(options: Options) -> None:
    """Anything goes."""


def limits(options: Options) -> dict[str, str]:
    """The toy engine loads it."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """From the base's directory, or not at all."""
    if options.when == "load":
        return Making("load")
    return Making("base", packages=("torch", "safetensors"), function=f"{__name__}:quantize")


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """A byte a weight and a float32 a row; everything else as it was."""
    total = 0
    for tensor in shape.tensors:
        rounded = tensor.layer is not None and len(tensor.shape) == 2
        total += tensor.weights + 4 * tensor.shape[0] if rounded else tensor.weights * DTYPE_BYTES[shape.dtype]
    return Stored(total)


def quantize(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: a directory with `codes` and `scale` in the place of each matrix."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    base, out = Path(payload["base"]), Path(payload["out"])
    if payload["options"]["when"] == "never":
        return {"tensor_types": {}}
    tensors: dict[str, Any] = {}
    types = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118 (it is no mapping)
                weight = source.get_tensor(name)
                types[name] = "F32"
                if name.startswith("model.layers.") and weight.dim() == 2:
                    tensors[f"{name}.codes"], tensors[f"{name}.scale"] = rounded(weight, payload["options"]["bits"])
                    types[name] = "RTN"
                else:
                    tensors[name] = weight
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    for file in base.glob("*.json"):
        if not file.name.startswith("model."):
            shutil.copyfile(file, out / file.name)
    progress(1, 1, "rounded")
    return {"tensor_types": types, "warnings": ["a toy"], "notes": ["rounded"], "provenance": {"toy": True}}


def rounded(weight: Any, bits: int) -> tuple[Any, Any]:
    """Codes (int8 [rows, columns]) and scales (float32 [rows, 1])."""
    import torch

    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (weight / scale).round().to(torch.int8), scale
