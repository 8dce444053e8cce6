"""A toy method that takes part in the calibration pass: matrices in 16 bits, their columns' importance beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.shape import Shape, Stored
from workbench.worker.layers import Layer
from workbench.worker.methods import Making

SHORTHAND = ""
WRITES: tuple[str, ...] = ("half",)
LIBRARY = "toy"
TAGS: tuple[str, ...] = ()
CONFIG_FILE = "toy.json"


@dataclass(frozen=True)
class Options:
    """There are none."""

    __pydantic_config__ = {"extra": "forbid"}


def default_name(options: Options) -> str:
    """`half`."""
    return "half"


def check(options: Options) -> None:
    """Anything goes."""


def limits(options: Options) -> dict[str, str]:
    """No engine loads it anyway."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """In the pass."""
    return Making("pass", "tokens", ("torch",))


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """As 16 bits."""
    return Stored(shape.parameters * 2)


def check_linear(options: Options, where: str, rows: int, columns: int, group_sizes: list[str]) -> None:
    """Every shape will do."""


def quantizes(options: Options, linear: str) -> bool:
    """All but the MLP's way out."""
    return not linear.endswith("down_proj")


def stored(options: Options, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """`half` and `importance`."""
    return {"half": ("F16", (rows, columns)), "importance": ("F16", (columns,))}


def tensor_type(options: Options) -> str:
    """`HALF`."""
    return "HALF"


def quantization_config(options: Options, kept: Sequence[str] = ()) -> dict[str, Any]:
    """Its name."""
    return {"quant_method": "half"}


def quantize(layer: Layer, options: Options) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """The weights again, and the diagonal of each Gram matrix."""
    tensors, errors = dict(layer.tensors), {}
    for group in layer.structure.groups:
        for linear in group.linears:
            if quantizes(options, linear):
                tensors[f"{linear}.half"] = tensors.pop(f"{linear}.weight")
                tensors[f"{linear}.importance"] = layer.grams[group.linears[0]].diagonal()
                errors[f"{linear}.weight"] = 0.0
    return tensors, errors, []
