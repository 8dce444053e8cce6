"""A product with a packed weight, as far as it is the same for every layout: which way, the launch, the sum of parts.

A layout (`awq`, `gptq`, `gguf.blocks`) checks its tensors and brings its reference and its kernels; the rest is here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from workbench_kernels.backend import ACTIVATIONS, Config, Kernel, bucket, choose_path, splits, triton, tuned
from workbench_kernels.checks import ALIGNMENT_BYTES, check_activations, check_aligned, short


class Runnable(Protocol):
    """What a product takes: Triton's `Launch`, or one of CUDA C++ (`decode.py`)."""

    @property
    def out(self) -> torch.Tensor: ...

    def run(self) -> None: ...


KEY = ("KIND", "N", "K", "BLOCKS", "RUN", "PLAIN", "BITS", "BUCKET")
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
    kernel: Callable[[str, torch.Tensor], Runnable],
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
        launch = kernel(way, flat if flat.data_ptr() % ALIGNMENT_BYTES == 0 else flat.clone())
        launch.run()
        y = launch.out
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

    @property
    def out(self) -> torch.Tensor:
        """What it writes."""
        out = self.arguments["out"]
        assert isinstance(out, torch.Tensor)
        return out

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
    x: torch.Tensor,
    weight: Mapping[str, torch.Tensor],
    outputs: int,
    configs: list[Config],
    tile: tuple[str, int],
    steps: Callable[[Config], int],
    constants: Mapping[str, object],
) -> Launch:
    """The launch of x [rows, in] times a packed weight, by a layout's decode or prefill kernel.

    `tile`: the constant that says how long a tile is along the weight's stored outputs, and how many of those there
    are. `steps`: how many steps a tile takes along K. Each tile is given the number of parts that K is cut into.
    """
    (name, length), rows = tile, x.shape[0]
    prefill = "BM" in configs[0]

    def tiles(meta: Mapping[str, int]) -> tuple[int, ...]:
        along = triton.cdiv(length, meta[name])
        return (triton.cdiv(bucket(rows), meta["BM"]), along) if prefill else (along,)

    # The sums of the parts, written and read, are to be no more than half of a weight of four bits.
    most = max(1, x.shape[1] // (32 * (bucket(rows) if prefill else 1)))

    def parts(config: Config) -> int:
        return splits(math.prod(tiles(config)), config["num_warps"], min(most, steps(config)), x.device)

    cut: list[Config] = [config | {"SPLIT": parts(config)} for config in configs]
    out = sums = arrived = x.new_empty(rows, outputs)
    most = max(config["SPLIT"] for config in cut)
    if most > 1:
        sums = x.new_empty(most, rows, outputs, dtype=torch.float32)
        arrived = x.new_zeros(max(math.prod(tiles(config)) for config in cut), dtype=torch.int32)
    arguments = {"x": x, **weight, "out": out, "sums": sums, "arrived": arrived, **constants}
    arguments |= {"M": rows, "BUCKET": bucket(rows)} if prefill else {}
    return Launch(function, arguments, cut, KEY, lambda meta: (*tiles(meta), meta["SPLIT"]))
