"""The base as other variants' methods are: it makes nothing, and every engine loads it in one of its two forms.

Engines that read no safetensors get it as a GGUF file of 16 bits. That is the conversion from which every GGUF variant
is quantized, or a BF16 of it where the base itself has 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from workbench.shape import DTYPE_BYTES, DTYPE_CODES, Shape, Stored
from workbench.worker.methods import Making, gguf

SHORTHAND = ""
WRITES: tuple[str, ...] = ("safetensors", "gguf")
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """There are none."""


def default_name(options: Options) -> str:
    """`base`."""
    return "base"


def check(options: Options) -> None:
    """Nothing can be wrong with it here."""


def limits(options: Options) -> dict[str, str]:
    """Every engine loads it."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """It is there."""
    return Making("load")


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """As it is, or as llama.cpp's base."""
    if form == "gguf":
        return gguf.sizes(shape, gguf.Options(sixteen_bit(shape.dtype)), form)  # type: ignore[arg-type]
    return Stored(shape.parameters * DTYPE_BYTES[shape.dtype])


def sixteen_bit(dtype: str) -> str:
    """The type of llama.cpp's base, for a base of that dtype."""
    return DTYPE_CODES[dtype] if DTYPE_BYTES[dtype] == 2 else "BF16"
