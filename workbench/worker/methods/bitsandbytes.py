"""bitsandbytes in transformers: linear layers are quantized as the base is loaded, and nothing is made beforehand.

NF4 and FP4 (arXiv 2305.14314): 16 levels, and a float32 scale for 64 weights. `int8` (arXiv 2208.07339): a byte a
weight and a float32 a row; inputs are rounded to 8 bits too, row by row, but for those with outliers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workbench.shape import Shape, Stored
from workbench.worker.methods import Making, loading

SHORTHAND = "type"
AXES = ("type",)
WRITES: tuple[str, ...] = ("bitsandbytes",)
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ("bitsandbytes",)

BLOCK = 64
"""Weights that share a scale in four bits."""


@dataclass(frozen=True)
class Options:
    """Quantized by bitsandbytes while transformers loads the base; its type alone may stand in place of the options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Four bits on NormalFloat's or float's levels, or eight bits with 8-bit inputs (LLM.int8)."""


def default_name(options: Options) -> str:
    """`bitsandbytes-nf4`."""
    return f"bitsandbytes-{options.type}"


def check(options: Options) -> None:
    """Every type can be had everywhere."""


def limits(options: Options) -> dict[str, str]:
    """What no engine reads is told by its format."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """By transformers, as it loads."""
    return Making("load", packages=("bitsandbytes", "transformers", "torch"), python="transformers")


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """What is in memory: codes and scales of a decoder's matrices, all else in 16 bits."""

    def of_matrix(rows: int, columns: int) -> float:
        return rows * (columns + 4.0) if options.type == "int8" else rows * columns * (0.5 + 4 / BLOCK)

    return loading.sizes(shape, of_matrix)


def quantization_config(options: Options) -> Any:
    """As transformers takes it. Scales of four bits stay as they are: rounding them too is not the default there."""
    import torch
    from transformers import BitsAndBytesConfig

    if options.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=options.type, bnb_4bit_compute_dtype=torch.bfloat16
    )
