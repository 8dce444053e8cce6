"""Which of GPTQModel's kernels compute AWQ and GPTQ on an NVIDIA GPU, compiled before anything is timed.

Left to itself GPTQModel 7.6 takes Machete on Hopper and Swordfish on Blackwell, which download CUTLASS, else Marlin,
ExLlama or AutoAWQ's GEMM, and compiles what it took while a checkpoint is loaded. Kept of them are Marlin, which
brings its sources and needs nvcc; Triton's, which needs no compiler; and torch's.
"""

from __future__ import annotations

from typing import Any

KEPT = ("marlin", "triton", "torch")
MARLIN_BITS = (4, 8)


def ready(bits: int) -> None:
    """Leave GPTQModel the kernels that need no download, and compile the one that it will take for so many bits; where
    that fails, because there is no nvcc, the next of them is taken."""
    keep(KEPT)
    if bits not in MARLIN_BITS:
        return
    from gptqmodel import extension

    try:
        # Both: its layers are made with float16 whatever the model's dtype is, and run in that of their input.
        extension.load("marlin")
    except RuntimeError:
        keep(KEPT[1:])


def keep(families: tuple[str, ...]) -> None:
    """Of the kernels that GPTQModel chooses among by itself, only those of some families, where a format has such."""
    from gptqmodel.utils import importer

    formats: list[dict[Any, Any]] = [
        each for of in importer.AUTO_BACKEND_KERNEL_MAPPING.values() for each in of.values()
    ]
    for kernels in formats:
        others = [kernel for kernel in kernels if not any(family in kernel.value for family in families)]
        if len(others) < len(kernels):
            for kernel in others:
                del kernels[kernel]


def why_slow(chosen: str) -> str | None:
    """A warning if another kernel than Marlin computes weights that it could; `chosen`: classes of layers."""
    if "Marlin" in chosen:
        return None
    return (
        f"AWQ and GPTQ computed by {chosen or 'no kernel of its own'}: GPTQModel's Marlin kernel did not compile "
        "(is nvcc on the path, and does `CUDA_HOME` lead to its toolkit?) or does not take these weights"
    )
