"""`k_quants.cu` compiled for the GPU that holds the weights, and launched: what `k_quants.py` computes, in one launch.

There it takes some thousand launches of torch's operators, each of which reads and writes all weights. The compiler is
NVRTC, told not to fuse and not to approximate; where it is missing, and on other makers' GPUs, `k_quants.py` stays.
"""

import ctypes
import functools
from pathlib import Path

import torch

from workbench_kernels import nvrtc

SOURCE = Path(__file__).with_name("k_quants.cu")
EXACT = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
RUNS = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 8, "Q5_K": 8, "Q6_K": 16}
"""Runs of a block, by the type: threads that make one."""
THREADS = 128


@functools.cache
def program(kind: str, weighted: bool) -> nvrtc.Program:
    """Of a type in `RUNS`, with importances or without."""
    return nvrtc.compiled(SOURCE.read_text(), *EXACT, f"-DK_QUANT={kind[1]}", f"-DIMPORTANCES={int(weighted)}")


def fill(kind: str, found: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor | None) -> None:
    """Blocks of `weight`, float32 [out, in], into `found`, uint8 [out, bytes of a row]; importances [in] or None."""
    blocks, row_blocks = weight.numel() // 256, weight.shape[1] // 256
    if not blocks:
        return
    weight = weight.contiguous()
    means = weight if importance is None else importance.contiguous()
    in_group = THREADS // RUNS[kind]
    program(kind, importance is not None).launch(
        "encode", [-(-blocks // in_group)], THREADS, [weight, means, found, ctypes.c_int64(blocks), row_blocks]
    )
