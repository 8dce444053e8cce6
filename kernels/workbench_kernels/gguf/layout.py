"""What a block type must say of itself, in the words that the kernels of all types share.

A row of W [out, in] is a run of blocks; a block is a few scales and the codes of 32 or 256 weights, and a weight is
`scale x code + shift` with scale and shift from its block. A block of a file is rarely a multiple of 8 bytes, so codes
in it lie where no wide load may begin. Its bytes are therefore sorted into **planes** when a weight is loaded
(`planes.py`): all blocks' codes, then all blocks' scales, and so on, every byte kept. A type names the bytes of each,
those with the widest loads first, and gives four small Triton functions (`Unpacking`), which are compiled into the
kernels:

- a **segment** is a run of J 32-bit words of codes whose scales are found together. `LOAD` reads the words [n, S, J] of
  some rows and segments, and their packed scales [n, S].
- a segment holds GROUPS x QUADS x 4 J weights: `CODES` cuts four codes, a byte each, out of every word in the
  registers, so every byte is loaded once. Word j's four stand side by side in W, at column `COLUMNS` + 4 j.
- weights of one **group** g share `SCALES` = (scale, shift), each [n, S]; a weight is scale x (code - LESS) + shift.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench_kernels.backend import Kernel


@dataclass(frozen=True)
class Layout:
    """Sizes of a block and of the parts that it is cut into; weights = segments x words x groups x quads x 4."""

    weights: int
    planes: tuple[tuple[int, int], ...]
    """The first byte in a block, and the one after the last, of what goes into each plane."""
    segments: int
    segment_words: int
    groups: int
    quads: int
    less: int = 0
    """What is taken from a code."""

    @property
    def size_bytes(self) -> int:
        """Of a block."""
        return sum(end - first for first, end in self.planes)


@dataclass(frozen=True)
class Unpacking:
    """The four Triton functions of a block type; the docstring of this file says what each gives.

    `load(w, count, first, s, j, inside)`: `w` the planes, `count` the blocks in them, `first` the first block of each
    row [n, 1], `s` segments of a row [1, S], `j` words [1, 1, J]. `scales(parts, s, g)`, `codes(parts, s, g, q)` and
    `columns(s, g, q)`: `parts` is what `load` gave.
    """

    load: Kernel
    scales: Kernel
    codes: Kernel
    columns: Kernel


@dataclass(frozen=True)
class Cuda:
    """What `cuda/rows.cu` asks of a type, and says there what it is; for those that it multiplies."""

    fours: int
    """How often a lane reads sixteen bytes of a row's 256 weights,"""
    words: int
    """and how often four."""
    source: str
    """Its functions, in CUDA C++."""
    runs: int = 8
    """That share a scale, of 256 weights."""


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's block types; the docstring of its file says which byte is what."""

    name: str
    layout: Layout
    unpacking: Unpacking
    shifted: bool
    """Whether a weight is more than a scale times its code."""
    reference: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [blocks, bytes] -> float32 [blocks, weights], in plain torch."""
    cuda: Cuda | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights; `ValueError` if they do not fill whole blocks."""
        if columns % self.layout.weights:
            raise ValueError(f"{columns} columns; supported by {self.name}: multiples of {self.layout.weights}")
        return columns // self.layout.weights * self.layout.size_bytes


# --- what the types' references share -----------------------------------------------------------


def halves(data: torch.Tensor) -> torch.Tensor:
    """The float16 numbers that bytes [n, 2 m] are: float32 [n, m]."""
    return data.contiguous().view(torch.float16).float()


def cut(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., m] cut into codes of so many bits: uint8 [..., 8 / bits, m], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    codes: torch.Tensor = (data[..., None, :] >> shifts[:, None]) & (2**bits - 1)
    return codes
