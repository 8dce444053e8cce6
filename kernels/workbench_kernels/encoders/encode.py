"""Blocks made on the device that holds the weights, byte for byte what llama.cpp's quantizer writes.

Plain torch, so any device: the types with 32 weights a block are in `small_blocks.py`, the K-quants in `k_quants.py`,
the searches that both are made of, and what it takes to be equal to the last bit, in `search.py`. On a GPU for which
NVRTC compiles, the K-quants are made by `k_quants.cu` instead. Here: which types there are, what may be encoded, and
the weights' way through torch in pieces of bounded memory.

A piece holds whole rows and lies turned around, [weight of a run, run, block, row]: what is summed in order then is
planes, and neighbours in memory are neighbouring rows, which a GPU reads together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench_kernels import nvrtc
from workbench_kernels.checks import short
from workbench_kernels.encoders import compiled_k_quants, k_quants, small_blocks
from workbench_kernels.gguf.types import BLOCK_TYPES

PIECE = {"cpu": 2**19, "cuda": 2**24}
"""Weights of a piece, by the device: what stays in a processor's cache; what keeps a GPU busy for longer than it takes
to ask for it. At the peak some 70 bytes a weight are in use."""


@dataclass(frozen=True)
class Encoder:
    """How blocks of a type are made of a piece; their sizes are in `BLOCK_TYPES`."""

    run: int
    """Weights that share a scale."""
    halves: tuple[int, int]
    """Where in a block the float16 numbers lie, bytes from and to."""
    make: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


ENCODERS = {
    "Q8_0": Encoder(32, (0, 2), small_blocks.q8_0),
    "Q6_K": Encoder(16, (208, 210), k_quants.q6_k),
    "Q5_K": Encoder(32, (0, 4), k_quants.q5_k),
    "Q5_1": Encoder(32, (0, 4), small_blocks.q5_1),
    "Q5_0": Encoder(32, (0, 2), small_blocks.q5_0),
    "Q4_K": Encoder(32, (0, 4), k_quants.q4_k),
    "Q4_1": Encoder(32, (0, 4), small_blocks.q4_1),
    "Q4_0": Encoder(32, (0, 2), small_blocks.q4_0),
    "Q3_K": Encoder(16, (108, 110), k_quants.q3_k),
    "Q2_K": Encoder(16, (80, 84), k_quants.q2_k),
}
"""Encoders by llama.cpp's name of the type."""


def encode(kind: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [out, in], importances of the inputs float32 [in] or none -> uint8 [out, bytes of a row].

    Raises `ValueError` for a type that is not in `ENCODERS`, rows that its blocks do not divide, other dtypes, other
    devices, importances of another size or below zero, and numbers that are not finite or whose scale is not in
    float16 (llama.cpp refuses to write those).
    """
    if kind not in ENCODERS:
        raise ValueError(f"type {kind}; supported: {', '.join(ENCODERS)}")
    encoder, layout = ENCODERS[kind], BLOCK_TYPES[kind].layout
    _check(kind, layout.weights, weight, importance)
    row_bytes = weight.shape[1] // layout.weights * layout.size_bytes
    found = torch.empty(weight.shape[0], row_bytes, dtype=torch.uint8, device=weight.device)
    if kind in compiled_k_quants.RUNS and nvrtc.available(weight.device):
        compiled_k_quants.fill(kind, found, weight, importance)
    else:
        _fill(encoder, layout.weights, found, weight, importance)
    start, end = encoder.halves
    if not bool(found.view(-1, layout.size_bytes)[:, start:end].contiguous().view(torch.float16).isfinite().all()):
        raise ValueError(f"weight holds numbers too large for the float16 scales of {kind}; supported: smaller ones")
    return found


def _fill(
    encoder: Encoder, in_block: int, found: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor | None
) -> None:
    """Blocks by torch into `found`, uint8 [out, bytes of a row], piece by piece."""
    outputs, inputs = weight.shape
    blocks, runs = inputs // in_block, in_block // encoder.run
    if importance is not None:
        importance = _turned(importance[None], blocks, runs, encoder.run)
    rows = max(1, PIECE.get(weight.device.type, PIECE["cpu"]) // inputs)
    for first in range(0, outputs, rows):
        piece = weight[first : first + rows]
        made = encoder.make(_turned(piece, blocks, runs, encoder.run), importance)
        found[first : first + rows] = made.view(piece.shape[0], -1)


def _turned(rows: torch.Tensor, blocks: int, runs: int, run: int) -> torch.Tensor:
    """[rows, in] -> [run, runs, blocks, rows], contiguous."""
    return rows.reshape(-1, blocks, runs, run).permute(3, 2, 1, 0).contiguous()


def _check(kind: str, in_block: int, weight: torch.Tensor, importance: torch.Tensor | None) -> None:
    if weight.dtype != torch.float32 or weight.ndim != 2:
        raise ValueError(f"weight is {short(weight.dtype)} with {weight.ndim} dimensions; supported: float32 [out, in]")
    inputs = weight.shape[1]
    if inputs % in_block or not inputs:
        raise ValueError(f"weight has {inputs} columns; supported for {kind}: multiples of {in_block}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinity; supported: finite numbers")
    if importance is None:
        return
    if importance.shape != (inputs,) or importance.dtype != torch.float32:
        raise ValueError(
            f"importance is {short(importance.dtype)} {tuple(importance.shape)}; supported: float32 [{inputs}]"
        )
    if importance.device != weight.device:
        raise ValueError(f"importance is on {importance.device}, weight on {weight.device}; supported: one device")
    if not bool((importance >= 0).all() & importance.isfinite().all()):
        raise ValueError("importance holds numbers below zero or not finite; supported: finite numbers from 0 on")
