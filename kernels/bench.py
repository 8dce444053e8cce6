"""How fast the operations are on this machine's GPU, and how near to what its memory can do.

    python kernels/bench.py                                     everything; a table, and JSON rows to standard output
    python kernels/bench.py --operations Q4_K awq --rows 1 16 --out results/<machine>/kernels.jsonl

For every operation, shape and number of rows: first the result is checked against the plain reference (a wrong one
is reported and not timed, and the exit code is 1), then it is timed and, in the same run, torch's fp16 matmul of
the same shape. Times are of the device: a CUDA graph of many calls between two events, so that launching from Python
does not count; the calls rotate over as many copies of the weight as do not fit into the second-level cache, so
that every call reads from memory. The bandwidth that a fraction is of is measured too, by copying 1 GiB.

Needs a CUDA GPU and Triton, and nothing else of this repository.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench_kernels.products import Launch

sys.path.append(str(Path(__file__).resolve().parent))

import torch  # noqa: E402

SHAPES = {
    "Llama-3.1-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Qwen3-0.6B": ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072)),
}
"""(out, in) of a model's linear layers: q and k/v, o, gate/up, down; equal ones once."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP = 128
COPY_BYTES = 2**30
REPLAYS = 15
TOLERANCE = 5e-3
"""Largest error over largest output, against the reference in float32; fp16 x and y, and a tile of W in fp16."""


@dataclass(frozen=True)
class Operation:
    """A packed weight and how to multiply with it."""

    make: Callable[[int, int], tuple[torch.Tensor, ...]]
    """(out, in) -> its tensors, random, on the GPU."""
    matmul: Callable[..., torch.Tensor]
    """(x, *tensors, path=...)"""
    launch: Callable[..., "Launch"]
    """(way, x, *tensors) -> what multiplying would launch, `way` being `decode` or `prefill`."""
    dequantize_launch: Callable[..., "Launch"]
    """(*tensors) -> what de-quantizing to float16 would launch."""


@dataclass(frozen=True)
class Measured:
    """What was found of one product, with `rows` rows of x."""

    rows: int
    weight_bytes: int
    moved_bytes: int
    """Bytes of the weight, x and y."""
    error: float
    samples_s: list[float]
    """Seconds a call; none where the result was wrong."""
    torch_fp16_s: float


def operations(device: str = "cuda") -> dict[str, Operation]:
    """All operations, by name, with weights on `device`."""
    from workbench_kernels import awq, gptq
    from workbench_kernels.gguf import blocks
    from workbench_kernels.gguf.layout import BlockType
    from workbench_kernels.gguf.planes import columns_of
    from workbench_kernels.gguf.types import BLOCK_TYPES

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)

    def scales(groups: int, outputs: int) -> torch.Tensor:
        return (torch.rand(groups, outputs, device=device) * 0.01 + 0.001).half()

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float16, device=device)

    def awq_operation() -> Operation:
        return Operation(
            lambda n, k: (words(k, n // 8), words(k // GROUP, n // 8), scales(k // GROUP, n)),
            awq.matmul,
            lambda way, x, *weight: awq.launch(way, x, weight),
            lambda *weight: awq.dequantize_launch(weight, empty(weight[0].shape[0], weight[2].shape[1])),
        )

    def gptq_operation(bits: int) -> Operation:
        def make(n: int, k: int) -> tuple[torch.Tensor, ...]:
            order = torch.arange(k, dtype=torch.int32, device=device) // GROUP
            return words(k * bits // 32, n), words(k // GROUP, n * bits // 32), scales(k // GROUP, n), order

        return Operation(
            make,
            lambda x, q, z, s, order, path: gptq.matmul(x, q, z, s, order, bits, plain=True, path=path),
            lambda way, x, *weight: gptq.launch(way, x, weight, bits, True),
            lambda *weight: gptq.dequantize_launch(weight, bits, True, empty(weight[3].shape[0], weight[2].shape[1])),
        )

    def block_operation(kind: BlockType) -> Operation:
        def dequantize_launch(planes: torch.Tensor) -> "Launch":
            columns = columns_of(kind, planes, torch.int16, kind.name)
            return blocks.dequantize_launch(kind, planes, empty(planes.shape[0], columns))

        def planes(n: int, k: int) -> tuple[torch.Tensor]:
            # Bytes below 32: any float16 among them is below 0.01, and products stay inside float16's range.
            found = torch.randint(0, 32, (n, kind.row_bytes(k)), dtype=torch.uint8, device=device)
            return (found.view(torch.int16),)

        return Operation(
            planes,
            partial(blocks.matmul, kind),
            partial(blocks.launch, kind),
            dequantize_launch,
        )

    found = {"awq-4": awq_operation()} | {f"gptq-{bits}": gptq_operation(bits) for bits in (4, 8)}
    return found | {name: block_operation(kind) for name, kind in BLOCK_TYPES.items()}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device; the best of twenty."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / min(event_seconds(lambda: target.copy_(source)) for _ in range(20))


def event_seconds(work: Callable[[], object]) -> float:
    """Seconds that the device takes for what `work` asks of it, between two events."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    work()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def device_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds a call, one sample a replay of a CUDA graph of all of them."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [event_seconds(graph.replay) / len(calls) for _ in range(REPLAYS + 2)][2:]


def rotations(weight_bytes: int) -> int:
    """Copies of a weight that together are four times the second-level cache, or what a third of memory holds."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    free_bytes, _ = torch.cuda.mem_get_info()
    return max(1, min(-(-4 * cache_bytes // weight_bytes) + 1, free_bytes // 3 // weight_bytes, 1024))


def relative_error(
    operation: Operation, x: torch.Tensor, weight: tuple[torch.Tensor, ...], path: str
) -> tuple[float, torch.Tensor]:
    """The largest error of a product over its largest output, by the reference in float32; and the product."""
    found = operation.matmul(x, *weight, path=path)
    expected = operation.matmul(x.float(), *weight, path="reference")
    return float((found.float() - expected).abs().max() / expected.abs().max()), found


def measure(
    operation: Operation, n: int, k: int, rows: list[int], path: str, torch_s: dict[tuple[int, int, int], float]
) -> Iterator[Measured]:
    """The product for each number of rows of x; `torch_s` keeps what torch took, by shape."""
    weight = operation.make(n, k)
    weight_bytes = sum(tensor.nbytes for tensor in weight)
    copies = [weight] + [tuple(t.clone() for t in weight) for _ in range(rotations(weight_bytes) - 1)]
    for m in rows:
        x = torch.randn(m, k, device="cuda", dtype=torch.float16)
        error, found = relative_error(operation, x, weight, path)
        samples_s: list[float] = []
        if error < TOLERANCE:
            times = max(len(copies), 24 if m <= 64 else 8)
            multiply = partial(operation.matmul, x, path=path)
            samples_s = device_seconds([partial(multiply, *copies[i % len(copies)]) for i in range(times)])
            if (n, k, m) not in torch_s:
                torch_s[n, k, m] = statistics.median(torch_seconds(x, n, k))
        moved_bytes = weight_bytes + x.nbytes + found.nbytes
        yield Measured(m, weight_bytes, moved_bytes, error, samples_s, torch_s.get((n, k, m), 0.0))


def torch_seconds(x: torch.Tensor, n: int, k: int) -> list[float]:
    """Seconds a call of the same product with an fp16 weight by torch."""
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
    copies = [weight] + [weight.clone() for _ in range(rotations(weight.nbytes) - 1)]
    times = max(len(copies), 24 if x.shape[0] <= 64 else 8)
    return device_seconds([partial(torch.matmul, x, copies[i % len(copies)].t()) for i in range(times)])


def row_of(name: str, model: str, path: str, n: int, k: int, found: Measured, copy_bytes_s: float) -> dict[str, Any]:
    """What was measured of one product, and what it is of the copy bandwidth and of torch's fp16."""
    row: dict[str, Any] = {"operation": name, "model": model, "path": path, "out": n, "in": k, "rows": found.rows}
    row |= {"weight_bytes": found.weight_bytes, "error": found.error, "copy_bytes_s": copy_bytes_s}
    if not found.samples_s:
        return row | {"wrong": True}
    seconds = statistics.median(found.samples_s)
    bytes_s, flop_s = found.moved_bytes / seconds, 2 * found.rows * n * k / seconds
    row |= {"seconds": seconds, "samples_s": found.samples_s, "bytes_s": bytes_s, "flop_s": flop_s}
    row |= {"torch_fp16_s": found.torch_fp16_s, "torch_ratio": found.torch_fp16_s / seconds}
    return row | {"bandwidth_fraction": bytes_s / copy_bytes_s}


def machine() -> dict[str, str | None]:
    """What a row must say of where it was measured."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def append(path: Path | None, row: dict[str, object]) -> None:
    """Write a row as one line of JSON at the end of a file, if one was named."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--operations", nargs="*", help="by default all")
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--path", default="auto", choices=("auto", "decode", "prefill", "dense"))
    parser.add_argument("--out", type=Path, help="a file that JSON rows are appended to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "bench.py measures a GPU, and torch sees none here (torch.cuda.is_available() is false).", file=sys.stderr
        )
        return 2
    try:
        where = machine()
    except ModuleNotFoundError:
        print("bench.py measures Triton kernels, and Triton is not installed: pip install triton", file=sys.stderr)
        return 2
    known = operations()
    unknown = sorted(set(arguments.operations or ()) - set(known))
    if unknown:
        print(f"unknown operation {unknown[0]!r}. Known: {', '.join(known)}", file=sys.stderr)
        return 2
    copy_bytes_s = copy_bandwidth()
    print(f"{where['gpu']}: copies {copy_bytes_s / 1e9:.0f} GB/s (read and written)")
    print(
        f"{'':10} {'out x in':>13} {'rows':>5} {'us':>9} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'x torch fp16':>12}"
    )
    wrong = 0
    torch_s: dict[tuple[int, int, int], float] = {}
    models = [(model, n, k) for model in arguments.models for n, k in SHAPES[model]]
    for name, (model, n, k) in itertools.product(arguments.operations or known, models):
        for found in measure(known[name], n, k, arguments.rows, arguments.path, torch_s):
            row = row_of(name, model, arguments.path, n, k, found, copy_bytes_s)
            label = f"{name:10} {f'{n} x {k}':>13} {found.rows:>5}"
            if row.get("wrong"):
                wrong += 1
                print(f"{label} WRONG by {found.error:.1e}, not timed", flush=True)
            else:
                speed = f"{row['seconds'] * 1e6:>9.1f} {row['bytes_s'] / 1e9:>7.0f} {row['bandwidth_fraction']:>8.2f} "
                print(label, speed + f"{row['flop_s'] / 1e12:>8.1f} {row['torch_ratio']:>12.2f}", flush=True)
            append(arguments.out, row | where)
        torch.cuda.empty_cache()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
