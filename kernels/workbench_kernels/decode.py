"""One row of x times a packed weight by CUDA C++: `cuda/*.cu`, which say how, with the tiles that are chosen here.

Each function gives a launch, or None where its kernel does not apply and Triton's is to be taken. On an H100 blocks
take 0.6 to 0.9 of Triton's time, words of AWQ and GPTQ up to 1.3 of it: these are asked only if
`WORKBENCH_KERNELS_DECODE=cuda`, and none if it is `triton`.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench_kernels import nvrtc
from workbench_kernels.backend import multiprocessors, run_length
from workbench_kernels.gguf.layout import BlockType

ASKED = os.environ.get("WORKBENCH_KERNELS_DECODE", "")
SOURCES = Path(__file__).parent / "cuda"
SHARED_BYTES = 99 * 1024
"""That a block has at most: what all GPUs from sm_86 on have."""
LONGEST_CHUNK = 128
SHORTEST_CHUNK = 32


@dataclass(frozen=True)
class CudaLaunch:
    """A function of CUDA C++ and all that running or compiling it needs."""

    program: nvrtc.Program
    function: str
    grid: tuple[int, ...]
    warps: int
    arguments: tuple[torch.Tensor, ...]
    """The last is what it writes."""
    shared_bytes: int
    cluster: int = 1

    @property
    def out(self) -> torch.Tensor:
        """What it writes."""
        return self.arguments[-1]

    def run(self) -> None:
        """Launch it; it waits for the launch ahead by itself."""
        self.program.launch(
            self.function,
            self.grid,
            32 * self.warps,
            self.arguments,
            shared_bytes=self.shared_bytes,
            cluster=self.cluster,
            dependent=True,
        )


def rows(kind: BlockType, way: str, x: torch.Tensor, planes: torch.Tensor) -> CudaLaunch | None:
    """x [1, in] times blocks in planes."""
    if ASKED != "triton" and _applies(way, x) and kind.cuda is not None and x.shape[1] % 256 == 0:
        return rows_launch(kind, x, planes)
    return None


def gptq(way: str, x: torch.Tensor, weight: tuple[torch.Tensor, ...], bits: int, plain: bool) -> CudaLaunch | None:
    """x [1, in] times a weight of `gptq.TENSORS`."""
    if ASKED == "cuda" and _applies(way, x) and plain and bits in (4, 8) and _chunk(x, weight[2]):
        return gptq_launch(x, weight, bits)
    return None


def awq(way: str, x: torch.Tensor, weight: tuple[torch.Tensor, ...]) -> CudaLaunch | None:
    """x [1, in] times a weight of `awq.TENSORS`; its sums are joined in a cluster, which GPUs have from sm_90 on."""
    if ASKED == "cuda" and _applies(way, x) and nvrtc.architecture_of(x.device) >= 90 and _chunk(x, weight[2]):
        return awq_launch(x, weight)
    return None


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
            "rows",
            kind.cuda.source,
            **_shape(x, outputs),
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
        "rows",
        (-(-outputs // (16 * tiles)),),
        warps,
        (x, planes, x.new_empty(1, outputs)),
        warps * (stages * unit_bytes + 256 * tiles),
    )


def gptq_launch(x: torch.Tensor, weight: tuple[torch.Tensor, ...], bits: int) -> CudaLaunch:
    """As `gptq`, wherever the tensors are."""
    qweight, qzeros, scales = weight[:3]
    outputs, chunk, deep, stages = scales.shape[1], _chunk(x, scales), 32 // bits, 2
    depths = chunk // deep // 4
    staged_bytes = stages * 32 * (depths * (16 + 2 * deep) + 12)
    warps = min(16, x.shape[1] // chunk, SHARED_BYTES // (staged_bytes + 128))
    tile = {"CHUNK": chunk, "WARPS": warps, "STAGES": stages, "SLICES": 1, "GROUP": x.shape[1] // scales.shape[0]}
    return CudaLaunch(
        _program("gptq", "", **_shape(x, outputs), LESS=0, BITS=bits, **tile),
        "gptq",
        (-(-outputs // 32),),
        warps,
        (x, qweight, qzeros, scales, x.new_empty(1, outputs)),
        warps * (staged_bytes + 128),
    )


def awq_launch(x: torch.Tensor, weight: tuple[torch.Tensor, ...], parts: int = 4) -> CudaLaunch:
    """As `awq`, wherever the tensors are. `parts`: blocks of a cluster."""
    qweight, qzeros, scales = weight
    outputs, chunk, stages = scales.shape[1], min(64, _chunk(x, scales)), 2
    wide = 1 if outputs % 16 else 2
    staged_bytes = stages * 32 * (chunk * wide + chunk // 2 + 20 * wide)
    warps = min(8, SHARED_BYTES // staged_bytes)
    tile = {"CHUNK": chunk, "WARPS": warps, "STAGES": stages, "WIDE": wide, "GROUP": x.shape[1] // scales.shape[0]}
    return CudaLaunch(
        _program("awq", "", **_shape(x, outputs), LESS=0, PARTS=parts, **tile),
        "awq",
        (parts, -(-outputs // (64 * wide))),
        warps,
        (x, qweight, qzeros, scales, x.new_empty(1, outputs)),
        warps * max(staged_bytes, 256 * wide),
        parts,
    )


def _applies(way: str, x: torch.Tensor) -> bool:
    return way == "decode" and x.dtype != torch.float32 and nvrtc.available(x.device)


def _chunk(x: torch.Tensor, scales: torch.Tensor) -> int:
    """Input channels that a warp takes at a time: of one group, none left over; 0 if there is no such number."""
    columns = x.shape[1]
    chunk = run_length(columns // scales.shape[0], columns, LONGEST_CHUNK)
    while columns % chunk:
        chunk //= 2
    return chunk if chunk >= SHORTEST_CHUNK else 0


def _shape(x: torch.Tensor, outputs: int) -> dict[str, int]:
    return {"BFLOAT": int(x.dtype == torch.bfloat16), "INPUTS": x.shape[1], "OUTPUTS": outputs}


@functools.cache
def _program(name: str, functions: str, **constants: int) -> nvrtc.Program:
    """The program of `cuda/<name>.cu`, with a type's functions where it has a place for them."""
    text = (SOURCES / f"{name}.cu").read_text(encoding="utf-8").replace("TYPE_FUNCTIONS", functions)
    source = (SOURCES / "machine.cu").read_text(encoding="utf-8") + text
    return nvrtc.compiled(source, *(f"-D{key}={value}" for key, value in constants.items()))
