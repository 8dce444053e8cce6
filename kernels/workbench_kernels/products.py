"""A product with a packed weight, as far as it is the same for every layout: which way, the launch, the sum of parts.

A layout (`awq`, `gptq`, `gguf.blocks`) checks its tensors and brings its reference and its kernels; the rest is here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from workbench_kernels.backend import ACTIVATIONS, Config, Kernel, bucket, choose_path, triton, tuned
from workbench_kernels.checks import check_activations, check_aligned, short

KEY = ("KIND", "N", "K", "RUN", "PLAIN", "BITS", "BUCKET", "SPLIT")
"""Arguments whose values decide which tile is best, of those that a kernel has."""


def multiply(
    x: torch.Tensor,
    columns: int,
    outputs: int,
    tensors: dict[str, torch.Tensor],
    path: str,
    *,
    reference: Callable[[torch.Tensor], torch.Tensor],
    dense: Callable[[torch.Tensor], torch.Tensor],
    kernel: Callable[[str, torch.Tensor], "Launch"],
) -> torch.Tensor:
    """x [..., columns] times the transpose of a packed weight [outputs, columns] -> [..., outputs], of x's type.

    `tensors`: the weight's, by name. The ways get x as [rows, columns]; `kernel`, which is asked for a launch, also
    whether for `decode` or `prefill`. `path`: see `backend.choose_path`. `ValueError` for a shape, type, stride or
    device that is not covered.
    """
    check_activations(x, columns, next(iter(tensors.values())).device)
    flat = x.view(-1, columns)
    way = choose_path(path, x, flat.shape[0])
    if flat.shape[0] == 0 or outputs == 0:
        return x.new_zeros(*x.shape[:-1], outputs)
    if way == "reference":
        y = reference(flat)
    elif way == "dense":
        y = dense(flat)
    else:
        check_aligned(tensors)
        y = product(kernel(way, flat), x.dtype)
    return y.view(*x.shape[:-1], outputs)


def dequantized_by_kernel(tensors: dict[str, torch.Tensor], dtype: torch.dtype, path: str) -> bool:
    """Whether a kernel de-quantizes these tensors to `dtype`; else the reference does.

    `path`: `auto`, `reference` or `kernel`. `ValueError` for a type or device that is not covered.
    """
    name, first = next(iter(tensors.items()))
    if dtype not in ACTIVATIONS:
        raise ValueError(f"{name} to {short(dtype)}; supported: {', '.join(map(short, ACTIVATIONS))}")
    if path == "reference" or (path == "auto" and first.device.type != "cuda"):
        return False
    choose_path("dense", first, first.shape[0])
    check_aligned(tensors)
    return True


@dataclass(frozen=True)
class Launch:
    """A kernel, what it is given, and the tiles that it may be cut into: all that running or compiling it needs."""

    function: Kernel
    arguments: Mapping[str, object]
    """By name; all but the tile's."""
    configs: list[Config]
    key: tuple[str, ...]
    """Arguments whose values decide which tile is best."""
    grid: Callable[[Mapping[str, int]], tuple[int, ...]]

    def programs(self, config: Config) -> int:
        """How many there are with such a tile."""
        return math.prod(self.grid(config))

    def run(self) -> None:
        """Launch it, with the best tile where there is a choice."""
        tuned(self.function, tuple(tuple(config.items()) for config in self.configs), self.key)[self.grid](
            **self.arguments
        )


def plan(
    function: Kernel,
    way: str,
    x: torch.Tensor,
    weight: Mapping[str, torch.Tensor],
    configs: list[Config],
    outputs: int,
    tile: str,
    length: int,
    parts: int,
    constants: Mapping[str, object],
) -> Launch:
    """The launch of x [rows, in] times a packed weight, by the layout's kernel for `decode` or `prefill`.

    `tile`: the constant that says how long a tile is along the weight's stored outputs, and `length`: how many of those
    there are. `parts`: into how many K is cut; each sums into a plane of its own of `out`.
    """
    rows = x.shape[0]
    out = x.new_empty(parts, rows, outputs, dtype=x.dtype if parts == 1 else torch.float32)
    arguments = {"x": x, **weight, "out": out, "SPLIT": parts, **constants}
    if way == "decode":
        return Launch(function, arguments, configs, KEY, lambda meta: (triton.cdiv(length, meta[tile]), parts))
    arguments |= {"M": rows, "BUCKET": bucket(rows)}
    return Launch(
        function,
        arguments,
        configs,
        KEY,
        lambda meta: (triton.cdiv(rows, meta["BM"]), triton.cdiv(length, meta[tile]), parts),
    )


def product(launch: Launch, dtype: torch.dtype) -> torch.Tensor:
    """y [rows, outputs] of a launch that `plan` gave. Planes are always summed in the same order, so a result does not
    change from run to run."""
    launch.run()
    out = launch.arguments["out"]
    assert isinstance(out, torch.Tensor)
    return out.sum(0).to(dtype) if out.shape[0] > 1 else out[0].to(dtype)
