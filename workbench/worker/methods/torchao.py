"""torchao in transformers: linear layers are quantized as the base is loaded, and nothing is made beforehand.

`int8`: a scale a row (`Int8WeightOnlyConfig`). `int4`: a scale and a zero a group (`IntxWeightOnlyConfig`), computed on
every device; its codes take a byte each in memory. torchao's packed four bits (`Int4WeightOnlyConfig`) need kernels of
a further package for each kind of device, and none comes for processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from workbench.errors import UserError
from workbench.shape import Shape, Stored
from workbench.worker.methods import Making, loading

SHORTHAND = "type"
AXES = ("type",)
WRITES: tuple[str, ...] = ("torchao",)
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ("torchao",)


@dataclass(frozen=True)
class Options:
    """Quantized by torchao while transformers loads the base; its type alone may stand in place of the options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    type: Literal["int8", "int4"] = "int8"
    """Bits of a weight; inputs stay as they are."""
    group_size: Literal[32, 64, 128] = 128
    """Inputs that share a scale, of `int4`; `int8` has a scale a row."""


def default_name(options: Options) -> str:
    """`torchao-int8` or `torchao-int4-g128`."""
    return f"torchao-{options.type}" + (f"-g{options.group_size}" if options.type == "int4" else "")


def check(options: Options) -> None:
    """Refuse a group size that would change nothing."""
    if options.type == "int8" and options.group_size != Options.group_size:
        raise UserError("torchao: int8 has a scale a row; leave `group_size` out")


def limits(options: Options) -> dict[str, str]:
    """What no engine reads is told by its format."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """By transformers, as it loads."""
    return Making("load", packages=("torchao", "transformers", "torch"), python="transformers")


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """What is in memory: a byte a code, and a scale and a zero of 5 bytes a row, or of 3 bytes a group."""

    def of_matrix(rows: int, columns: int) -> float:
        return rows * (columns + (3 * columns / options.group_size if options.type == "int4" else 5))

    return loading.sizes(shape, of_matrix, options.group_size if options.type == "int4" else 1)


def quantization_config(options: Options) -> Any:
    """As transformers takes it."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if options.type == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    four_bits: Any = vars(torch)["int4"]
    return TorchAoConfig(IntxWeightOnlyConfig(four_bits, PerGroup(options.group_size)))
