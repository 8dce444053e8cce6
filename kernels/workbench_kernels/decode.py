"""One row of x times GGUF blocks by CUDA C++: `cuda/rows.cu`, which says how, with the tile that is chosen here.

On an H100 it takes 0.6 to 0.9 of Triton's time; with `WORKBENCH_KERNELS_DECODE=triton` it is not taken. Rejected: the
same for words of AWQ and GPTQ, which took up to 1.3 of Triton's time there.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench_kernels import nvrtc
from workbench_kernels.backend import multiprocessors
from workbench_kernels.gguf.layout import BlockType

ASKED = os.environ.get("WORKBENCH_KERNELS_DECODE", "")
SOURCES = Path(__file__).parent / "cuda"
SHARED_BYTES = 99 * 1024
"""That a block has at most: what all GPUs from sm_86 on have."""


@dataclass(frozen=True)
class CudaLaunch:
    """`rows` of `cuda/rows.cu` and all that running or compiling it needs."""

    program: nvrtc.Program
    grid: tuple[int, ...]
    warps: int
    arguments: tuple[torch.Tensor, ...]
    """The last is what it writes."""
    shared_bytes: int

    @property
    def out(self) -> torch.Tensor:
        """What it writes."""
        return self.arguments[-1]

    def run(self) -> None:
        """Launch it; it waits for the launch ahead by itself."""
        self.program.launch(
            "rows",
            self.grid,
            32 * self.warps,
            self.arguments,
            shared_bytes=self.shared_bytes,
            dependent=True,
        )


def rows(kind: BlockType, way: str, x: torch.Tensor, planes: torch.Tensor) -> CudaLaunch | None:
    """x [1, in] times blocks in planes; None where the kernel does not apply and Triton's is to be taken."""
    if ASKED == "triton" or way != "decode" or x.dtype == torch.float32 or not nvrtc.available(x.device):
        return None
    return rows_launch(kind, x, planes) if kind.cuda is not None and x.shape[1] % 256 == 0 else None


def rows_launch(kind: BlockType, x: torch.Tensor, planes: torch.Tensor) -> CudaLaunch:
    """As `rows`, wherever the tensors are."""
    assert kind.cuda is not None
    outputs, columns = planes.shape[0], x.shape[1]
    first, end = kind.layout.planes[0]
    pieces = (end - first) * 256 // kind.layout.weights // 64
    tiles = min(8, -(-outputs // (16 * multiprocessors(x.device))))
    unit_bytes = 2 * (512 * kind.cuda.fours + 128 * kind.cuda.words)
    # As many warps as there are 256 columns, or all as often; then as many steps ahead as there is memory for.
    most = min(16, SHARED_BYTES // (unit_bytes + 256 * tiles))
    warps = -(-columns // 256 // -(-(columns // 256) // most)) if columns // 256 > most else columns // 256
    stages = min(4, (SHARED_BYTES // warps - 256 * tiles) // unit_bytes)
    return CudaLaunch(
        _program(
            kind.cuda.source,
            BFLOAT=int(x.dtype == torch.bfloat16),
            INPUTS=columns,
            OUTPUTS=outputs,
            LESS=kind.layout.less,
            SHIFTED=int(kind.shifted),
            WEIGHTS=kind.layout.weights,
            RUNS=kind.cuda.runs,
            PIECES=pieces,
            GROUPS=4 // pieces,
            FOURS=kind.cuda.fours,
            WORDS=kind.cuda.words,
            TILES=tiles,
            WARPS=warps,
            STAGES=stages,
        ),
        (-(-outputs // (16 * tiles)),),
        warps,
        (x, planes, x.new_empty(1, outputs)),
        warps * (stages * unit_bytes + 256 * tiles),
    )


@functools.cache
def _program(functions: str, **constants: int) -> nvrtc.Program:
    """The program of `cuda/rows.cu` with a type's functions in their place."""
    machine, rows_of = ((SOURCES / name).read_text(encoding="utf-8") for name in ("machine.cu", "rows.cu"))
    return nvrtc.compiled(
        machine + rows_of.replace("TYPE_FUNCTIONS", functions),
        *(f"-D{key}={value}" for key, value in constants.items()),
    )
