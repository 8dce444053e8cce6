"""Triton where it is installed, and what a launch must know of the machine.

Triton is optional: the plain torch references work without it, on any device. Without it `jit` leaves a function as
it is (nothing calls it) and asking for a kernel is a `ValueError` that says so.

`TRITON_INTERPRET=1`, set before this is imported, runs every kernel on the CPU, slowly and exactly; that is how
the tests run them without a GPU.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = None

    class tl:  # type: ignore[no-redef]
        """Stands in for `triton.language` in signatures."""

        constexpr = None


Kernel = Any
"""A Triton function, which has no type that could be named."""
Config = dict[str, int]
"""Constants of a kernel's tile, and `num_warps` and `num_stages`."""

jit: Callable[[Callable[..., object]], Kernel] = triton.jit if triton else lambda function: function
"""Makes a Triton function of one that is written in its language."""
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Whether kernels run in Triton's interpreter, on CPU tensors."""
INTERPRETED = tl.constexpr(INTERPRET) if triton else None
"""The same for kernels: the interpreter knows no instruction of a GPU."""
TUNE = os.environ.get("WORKBENCH_KERNELS_TUNE", "1") != "0"
"""Whether all tiles of a kernel are tried on a shape's first call; `WORKBENCH_KERNELS_TUNE=0`: the first is taken."""

ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

DENSE_ROWS = 256
"""From so many rows on, a matrix is de-quantized piece by piece and multiplied by the vendor's library: the work of
unpacking is then small beside the product, which that library does best."""
DENSE_BYTES = 32 * 2**20
"""Size of one such piece, so that it is still in a large GPU's second-level cache when it is multiplied."""
HOPPER_MULTIPROCESSORS = 132
WARPS = 16
"""Warps that a multiprocessor should have before K is no longer split: enough loads are then on their way to hide how
long memory takes to answer."""


@jit
def share(part, steps: tl.constexpr, SPLIT: tl.constexpr):
    """The steps, from and to, of part `part` of SPLIT."""
    each: tl.constexpr = (steps + SPLIT - 1) // SPLIT
    return part * each, tl.minimum(part * each + each, steps)


def packing_of(tensor: torch.Tensor) -> dict[str, object]:
    """What a kernel has to know of floats that it reads or writes as 64-bit words."""
    types = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {"TYPE": types[tensor.dtype], "TOGETHER": 8 // tensor.dtype.itemsize}


@jit
def store_joined(y, out, sums, arrived, place, inside, length, part, SPLIT: tl.constexpr):
    """Store a program's sums `y` at `place` of `out`, which has `length` elements.

    Where K was cut, each part stores into a plane of its own, and the last of a tile's parts to arrive, by the counter
    `arrived`, adds all of them. It does so in their order, so a result does not change from run to run; and it leaves
    the counter as it was, so a launch can be repeated.
    """
    if SPLIT == 1:
        tl.store(out + place, y, mask=inside)
    else:
        tl.store(sums + part * length + place, y, mask=inside)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1) == SPLIT - 1:
            total = tl.zeros_like(y)
            for other in range(SPLIT):
                total += tl.load(sums + other * length + place, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + place, total, mask=inside)
            tl.store(arrived, 0)


@jit
def value_of(words, index, TYPE: tl.constexpr):
    """Value `index` of those that lie packed in 64-bit `words`: x is loaded so, in the layout that the codes have."""
    if tl.float32 == TYPE:
        return (words >> (32 * index)).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        return (words >> (16 * index)).to(tl.int16).to(TYPE, bitcast=True)


@jit
def bits_of(values, index: tl.constexpr, TYPE: tl.constexpr):
    """The inverse: float32 `values` as TYPE, at place `index` of 64-bit words that are zero elsewhere."""
    if tl.float32 == TYPE:
        return (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) << (32 * index)
    else:
        return (values.to(TYPE).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << (16 * index)


@jit
def code_as_float(word, bit: tl.constexpr, bits: tl.constexpr, less: tl.constexpr):
    """The `bits` bits, eight at most, from `bit` on of an int32, less a constant, as float32, exactly.

    Put into the lower end of a float's fraction, a code only has to lose what the float is without it: an operation
    each on the integer and on the float units, and no conversion, of which GPUs do a quarter as many.
    """
    low: tl.constexpr = bit % 16
    code = (word if bit < 16 else word >> 16) & ((2**bits - 1) << low)
    return (code | ((150 - low) << 23)).to(tl.float32, bitcast=True) - (2.0 ** (23 - low) + less)


@jit
def permuted(low, high, selector):
    """Four of the eight bytes of `low` (0 to 3) and `high` (4 to 7), int32: in byte i the one whose number is in bits
    4 i to 4 i + 2 of `selector`; its bits 4 i + 3 are zero."""
    if INTERPRETED:
        both, found = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF), tl.zeros_like(selector)
        for i in tl.static_range(4):
            found |= ((both >> (8 * ((selector >> (4 * i)) & 7))) & 255).to(tl.int32) << (8 * i)
        return found
    else:
        instruction: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(instruction, "=r,r,r,r", [low, high, selector], tl.int32, is_pure=True, pack=1)


def parted(config: Config) -> tuple[Config, Config]:
    """Constants of the tile; `num_warps` and `num_stages`."""
    options = {name: value for name, value in config.items() if name.startswith("num_")}
    return {name: value for name, value in config.items() if name not in options}, options


@functools.cache
def tuned(kernel: Kernel, configs: tuple[tuple[tuple[str, int], ...], ...], key: tuple[str, ...]) -> Kernel:
    """The kernel behind Triton's autotuner: each of `configs` (the items of a `Config`) is tried once for each value of
    the arguments named in `key`; in the interpreter, where nothing is timed, the first of them is taken."""
    choices = [parted(dict(config)) for config in configs[: None if TUNE else 1]]
    if INTERPRET:

        class First:
            def __getitem__(self, grid: Any) -> Any:
                return functools.partial(kernel[grid], **choices[0][0])

        return First()
    tiles = [triton.Config(tile, **options) for tile, options in choices]
    return triton.autotune(configs=tiles, key=list(key), cache_results=True)(kernel)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 1 in the interpreter, an H100's where a launch of tensors without storage is planned."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return HOPPER_MULTIPROCESSORS if device.type == "meta" else 1


def splits(programs: int, warps: int, steps: int, device: torch.device) -> int:
    """Into how many parts K, of so many steps, is cut (a power of two up to 32), so that programs of `warps` warps fill
    the GPU."""
    parts = 1
    while parts < 32 and programs * parts * warps < WARPS * multiprocessors(device) and 2 * parts <= steps:
        parts *= 2
    return parts


def run_length(group: int, columns: int, longest: int) -> int:
    """The longest power of two, up to `longest`, of columns that share a scale in every run of as many."""
    while group < columns and group % longest:
        longest //= 2
    return longest


def bucket(rows: int) -> int:
    """Row counts that share a tuned configuration: up to 16, then by powers of two."""
    return max(16, 1 << (rows - 1).bit_length())


def choose_path(path: str, x: torch.Tensor, rows: int) -> str:
    """Which way a product is computed: `reference`, `decode` (one row), `prefill` (few to many) or `dense`.

    `auto` is the reference on the CPU. Raises `ValueError` for a kernel that cannot run here.
    """
    ways = ("auto", "reference", "decode", "prefill", "dense")
    if path not in ways:
        raise ValueError(f"path {path!r}: supported are {', '.join(ways)}")
    if path == "auto":
        if x.device.type != "cuda":
            return "reference"
        path = "decode" if rows == 1 else "prefill" if rows < DENSE_ROWS else "dense"
    if path == "reference":
        return path
    if triton is None:
        raise ValueError(f"path {path!r} needs Triton, which is not installed here; supported without it: reference")
    if x.device.type != "cuda" and not INTERPRET:
        raise ValueError(f"x is on {x.device}: kernels run on CUDA devices; supported there: reference")
    if path == "decode" and rows != 1:
        raise ValueError(f"path 'decode' is for one row, x has {rows}; supported for more: prefill, dense")
    return path
