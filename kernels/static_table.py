"""The static check of every kernel: compiled as its launcher has it, for GPUs that need not be there; a table.

    python kernels/static_table.py [Q4_K awq-4 ...] [--kernels decode] [--architectures 80 90 100] [--all-tiles]

One line for a kernel and an architecture. A decode kernel is compiled for every shape of Llama-3.1-8B, the others for
the first, with the first of the tiles that the tuner may choose from, or with `--all-tiles` with each; where there are
several, a line has the worst. `codes`, `x`, `stores`: bytes of the narrowest load of codes and of activations, and of
the narrowest store; `programs`: of the grid, the fewest. What a kernel should be and is not stands in the last column;
`compiled.py` says where the figures come from. Needs Triton and no GPU. Exit code 1 where something stands there.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# The default from Triton 3.10 on is another one, and without this 3.9 says so on every run.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# Triton's cache goes by the text of functions, and what is found in it may name lines that they no longer stand in.
os.environ.setdefault("TRITON_ALWAYS_COMPILE", "1")
sys.path.append(str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from bench import SHAPES, operations  # noqa: E402
from workbench_kernels.backend import HOPPER_MULTIPROCESSORS  # noqa: E402
from workbench_kernels.compiled import Facts, facts  # noqa: E402
from workbench_kernels.products import Launch  # noqa: E402

ARCHITECTURES = (80, 90, 100)
KERNELS = ("decode", "prefill", "dequantize")
PREFILL_ROWS = 16
LEAST_BYTES = 8
HEADER = (
    f"{'':7} {'':10} {'sm':>4} {'registers':>9} {'spilled':>7} {'shared':>6} {'instr.':>6} {'codes':>5} {'x':>3} "
    f"{'stores':>6} {'programs':>8}"
)


def launches(operation: str, kernel: str) -> Iterator[Launch]:
    """What the launchers would launch: decode at all shapes, the others at the first."""
    known = operations("meta")[operation]
    for n, k in SHAPES["Llama-3.1-8B"][: None if kernel == "decode" else 1]:
        weight = known.make(n, k)
        if kernel == "dequantize":
            yield known.dequantize_launch(*weight)
        else:
            x = torch.empty(1 if kernel == "decode" else PREFILL_ROWS, k, dtype=torch.float16, device="meta")
            yield known.launch(kernel, x, *weight)


def narrowest(found: list[Facts], role: str) -> int:
    """Bytes of the narrowest access in that role; 0 if there is none."""
    return min(min(one.access_bytes[role], default=0) for one in found)


def failures(kernel: str, found: list[Facts]) -> list[str]:
    """What these launches of a kernel should be and are not."""
    wrong = []
    if kernel != "dequantize" and any(one.spilled_bytes for one in found):
        wrong.append("spills")
    if kernel != "dequantize" and narrowest(found, "codes") < LEAST_BYTES:
        wrong.append("narrow codes")
    if kernel == "decode" and narrowest(found, "activations") < LEAST_BYTES:
        wrong.append("narrow x")
    if kernel == "decode" and min(one.programs for one in found) < HOPPER_MULTIPROCESSORS:
        wrong.append("few programs")
    if kernel == "dequantize" and narrowest(found, "stores") < 16:
        wrong.append("narrow stores")
    return wrong


@dataclass(frozen=True)
class Line:
    """One of the table: the launches of a kernel on one architecture."""

    operation: str
    kernel: str
    architecture: int
    found: list[Facts]

    @property
    def wrong(self) -> list[str]:
        """What stands in the last column."""
        return failures(self.kernel, self.found)

    def __str__(self) -> str:
        found = self.found
        widths = [narrowest(found, role) for role in ("codes", "activations", "stores")]
        return (
            f"{self.operation:7} {self.kernel:10} {self.architecture:>4} {max(f.registers for f in found):>9} "
            f"{max(f.spilled_bytes for f in found):>7} {max(f.shared_bytes for f in found):>6} "
            f"{max(f.instructions for f in found):>6} {widths[0]:>5} {widths[1] or '':>3} "
            f"{widths[2]:>6} {min(f.programs for f in found):>8} "
            f"{', '.join(self.wrong)}".rstrip()
        )


def table(
    names: Iterable[str], kernels: Iterable[str], architectures: Iterable[int], all_tiles: bool = False
) -> Iterator[Line]:
    """The table's lines, without `HEADER`."""
    for name, kernel, architecture in itertools.product(names, kernels, architectures):
        yield Line(
            name,
            kernel,
            architecture,
            [
                facts(launch, architecture, config)
                for launch in launches(name, kernel)
                for config in (launch.configs if all_tiles else launch.configs[:1])
            ],
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("operations", nargs="*", help="by default all")
    parser.add_argument("--kernels", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--architectures", nargs="*", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--all-tiles", action="store_true")
    arguments = parser.parse_args()
    names = arguments.operations or list(operations("meta"))
    wrong = False
    print(HEADER, flush=True)
    for line in table(names, arguments.kernels, arguments.architectures, arguments.all_tiles):
        print(line, flush=True)
        wrong = wrong or bool(line.wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
