"""What the checkpoints of AWQ and GPTQ share: linear layers of a decoder as codes with a scale and a zero a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from workbench.errors import UserError
from workbench.shape import DTYPES, NamedShape, Shape, Stored
from workbench.worker.architectures import FUSED, LAYERS, SEPARATE
from workbench.worker.methods import Making

LINEARS = {linear.gguf: name for name, linear in (FUSED | SEPARATE).items()}
"""The linear layers of a decoder layer: GGUF's name -> that in a checkpoint."""


def sizes(
    shape: Shape,
    options: Any,
    quantizes: Callable[[Any, str], bool],
    stored: Callable[[Any, str, int, int], dict[str, tuple[str, tuple[int, ...]]]],
) -> Stored:
    """A checkpoint's bytes: packed linear layers, everything else in 16 bits; and whether groups divide every layer."""
    total, columns = 0, set[int]()
    for tensor in shape.tensors:
        linear = _linear(tensor)
        if linear:
            columns.add(tensor.shape[1])
        if linear and quantizes(options, linear):
            parts = stored(options, linear, *tensor.shape).values()
            total += sum(DTYPES[dtype].size_bytes * math.prod(sides) for dtype, sides in parts)
        else:
            total += tensor.weights * 2
    size = options.group_size
    if options.engine != "workbench" or size == -1 or all(count % size == 0 for count in columns):
        return Stored(total)
    possible = " or ".join(map(str, group_sizes(columns) or [-1]))
    return Stored(total, refused=f"group_size {size} does not divide the inputs of every layer; take {possible}")


def check_linear(options: Any, where: str, rows: int, columns: int, possible: list[str]) -> None:
    """Refuse a group size and a shape that do not go together, saying what would."""
    size, bits = options.group_size, options.bits
    if size != -1 and columns % size:
        advice = f"take {' or '.join(possible)}" if possible else "take -1 (whole rows)"
        raise UserError(f"{where}: group_size {size} does not divide its {columns} inputs; {advice}")
    unit = 32 // math.gcd(bits, 32)
    if rows % unit or columns % unit:
        raise UserError(
            f"{where}: {bits} bits are stored {unit} at a time, which does not divide its sizes; take other bits, or a "
            "GGUF type"
        )


def tensor_type(options: Any) -> str:
    """What a quantized tensor is called in an artifact's record."""
    return f"I{options.bits}-" + ("row" if options.group_size == -1 else f"g{options.group_size}")


def making(method: str, options: Any) -> Making:
    """In the calibration pass, or by GPTQModel in its own interpreter and on the same tokens."""
    packages = ("torch", "transformers")
    if options.engine == "workbench":
        return Making("pass", "tokens", packages)
    return Making(
        "base",
        "tokens",
        packages,
        python="gptqmodel",
        function="workbench.worker.methods.gptqmodel:gptqmodel",
        arguments={"method": method},
        maker_packages=("gptqmodel",),
        label="GPTQModel",
        environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
    )


def group_sizes(columns: Iterable[int]) -> list[int]:
    """The group sizes that every engine's kernels load (whole rows not everywhere: GPTQModel's kernel for CPUs has its
    own four sizes), as far as they divide the inputs of all these layers."""
    common = math.gcd(*columns)
    return [size for size in (32, 64, 128) if common % size == 0]


def _linear(tensor: NamedShape) -> str | None:
    """The full name in a checkpoint of a matrix of a decoder layer, which AWQ and GPTQ quantize."""
    parts = tensor.name.split(".")
    if tensor.layer is None or len(tensor.shape) != 2 or parts[2] not in LINEARS:
        return None
    return f"{LAYERS}.{tensor.layer}.{LINEARS[parts[2]]}"
