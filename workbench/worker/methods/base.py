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
        return gguf.sizes(shape, _sixteen_bit(shape.dtype), form)
    return Stored(shape.parameters * DTYPE_BYTES[shape.dtype])


def conversion(dtype: str, model: str) -> Making:
    """How a base of that dtype becomes the GGUF file of its own precision that all others are made from."""
    kind = DTYPE_CODES[dtype]
    return Making(
        "base",
        packages=gguf.PACKAGES,
        function="workbench.worker.methods.gguf:convert",
        arguments={"dtype": dtype, "name": model},
        file_name=f"{kind}.gguf",
    )


def sixteen_bit(dtype: str) -> Making:
    """How that file becomes llama.cpp's base."""
    return gguf.making(_sixteen_bit(dtype), cuda=False)


def _sixteen_bit(dtype: str) -> gguf.Options:
    return gguf.Options("F16" if dtype == "float16" else "BF16")
