"""GPTQ from Gram matrices: rounding with error feedback, written as a GPTQ v1 checkpoint.

For a linear layer with weights W [out, in] and G = mean(x x^T) of its inputs, the expected squared error of a
quantized Q is tr(E G E^T) with E = W - Q. GPTQ (arXiv 2210.17323) rounds column by column and moves each
column's error onto those still to come. It is computed here in the form of QuIP (arXiv 2307.13304, section 4):
with G = U D U^T, U unit upper triangular, column k becomes Q(w_k + sum_{j<k} e_j U_jk). That is the same rounding
as through the Cholesky factor of the inverse, but needs one factorisation and no inverse, and the total error
falls out of it: sum_k D_k |t_k - q_k|^2, where t_k is what was rounded.

Three choices matter as much as the feedback: each group's scale is searched for the least error weighted by
diag(G), not set by the largest weight; scales are fixed beforehand from the original weights; and columns go in
group-aware order (groups by their largest diagonal entry, columns inside a group likewise; GPTQModel's idea), which
gives most of act-order's gain and leaves the plain group layout that every engine loads.

All arrays are transposed, [in, out]: a column of W is then contiguous, and both checkpoint layouts store it so.
On a processor one column costs ten operations on vectors of `out` entries, about 30 microseconds; the whole of it is
less than the forward pass, and a compiled kernel would gain little. On a GPU, where each is a launch longer than
its work, a kernel rounds a block of columns at once (`kernels/`, `feedback`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from workbench.errors import UserError
from workbench.shape import Shape, Stored
from workbench.worker import Tensors
from workbench.worker.layers import Layer
from workbench.worker.methods import Making, grouped
from workbench.worker.methods.both_sides import by_outputs, pieces
from workbench.worker.methods.feedback import Factor, factored
from workbench.worker.methods.rounding import (
    Grid,
    Rounded,
    check_grid,
    compensate,
    group_aware_order,
    output_power,
    quadratic,
    ratio,
    row_slices,
    search_grid,
    singular,
    stacked,
)

SHORTHAND = ""
LATER = ("objective",)
WRITES: tuple[str, ...] = ("gptq", "gguf", "mlx", "compressed-tensors", "whole")
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ("gptq",)
CONFIG_FILE = "quantize_config.json"


@dataclass(frozen=True)
class Options:
    """A safetensors checkpoint whose rounding errors are made good by the columns still to come."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    bits: Literal[2, 3, 4, 8] = 4
    """Width of a weight; engines load 4 and 8, and 8 in vLLM on a GPU only."""
    group_size: int = 128
    """Inputs that share a scale; -1: a whole row."""
    sym: bool = True
    """Symmetric groups, without zero points; vLLM loads no others."""
    desc_act: bool = False
    """Act-order: columns by importance across groups. Neither vLLM nor llama.cpp loads it with groups."""
    order: Literal["group-aware", "natural"] = "group-aware"
    """In which order columns are rounded: the important first, group by group, or as they stand."""
    damping: float = 0.01
    """Added to the diagonal of the inputs' Gram matrix, as a fraction of its mean."""
    objective: Literal["input", "output"] = "input"
    """What rounding keeps: the layer's outputs, or what the model says, by gradients; the latter takes a pass of its
    own, on the default model five times as long."""
    engine: Literal["workbench", "gptqmodel"] = "workbench"
    """Who makes it; `gptqmodel`: the library GPTQModel, also for architectures that the workbench does not know."""


def default_name(options: Options) -> str:
    """`gptq-4bit-g128`, with what differs from the defaults after it."""
    parts = [f"gptq-{options.bits}bit", "row" if options.group_size == -1 else f"g{options.group_size}"]
    parts += [] if options.sym else ["asym"]
    parts += ["act-order"] if options.desc_act else []
    parts += ["natural"] if options.order == "natural" and not options.desc_act else []
    parts += ["output"] if options.objective == "output" else []
    parts += [options.engine] if options.engine != "workbench" else []
    return "-".join(parts)


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what no checkpoint of this format can hold."""
    check_grid("gptq", options.group_size, options.damping)
    grouped.check_objective("gptq", options)
    if options.desc_act and options.objective == "output":
        raise UserError(
            "gptq: `objective: output` gives q, k and v an order each, and engines that fuse them keep one; leave "
            "`desc_act` out"
        )


def limits(options: Options) -> dict[str, str]:
    """Backend name -> why that engine cannot load a checkpoint with these options, nor what it is carried to."""
    found = grouped.carried_limits(options)
    if options.bits == 8 and not options.sym:
        found["llamacpp"] = "no type of llama.cpp's holds 8 bits with zero points; set `sym: true`"
    if options.desc_act and options.group_size != -1:
        found["vllm"] = "vLLM no longer loads GPTQ with desc_act and groups; leave `desc_act` out"
        found["llamacpp"] = "llama.cpp's blocks are runs of inputs, desc_act's groups are not; leave `desc_act` out"
        found["mlx"] = "MLX's groups are runs of inputs, desc_act's are not; leave `desc_act` out"
    if options.bits not in (4, 8) or not options.sym:
        found["vllm"] = f"vLLM loads GPTQ only as symmetric 4 or 8 bits, not {options.bits} bits with sym={options.sym}"
    return found


def making(options: Options, cuda: bool) -> Making:
    """In the calibration pass, or by GPTQModel."""
    return grouped.making("gptq", options)


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """What the checkpoint will hold, or what it is carried to."""
    if form == "mlx":
        return grouped.mlx_sizes(shape, options, quantizes)
    if form == "compressed-tensors":
        return grouped.compressed_sizes(shape, options, quantizes)
    if form == "gguf":
        return grouped.carried_sizes(shape, options, quantizes, container_of(options))
    return grouped.sizes(shape, options, quantizes, stored)


def container_of(options: Options) -> str:
    """llama.cpp's type with the same codes; empty if there is none."""
    zero = 2 ** (options.bits - 1)
    least, largest = (zero, zero) if options.sym else (0, 2**options.bits - 1)
    return grouped.container(options.bits, least, largest) or ""


# --- what the pass asks of a method -------------------------------------------------------------

check_linear = grouped.check_linear
tensor_type = grouped.tensor_type


def stored(options: Options, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors a linear layer becomes: suffix -> (safetensors dtype, shape). The bias is the caller's."""
    size = columns if options.group_size == -1 else options.group_size
    groups = columns // size
    return {
        "qweight": ("I32", (columns * options.bits // 32, rows)),
        "qzeros": ("I32", (groups, rows * options.bits // 32)),
        "scales": ("F16", (groups, rows)),
        "g_idx": ("I32", (columns,)),
    }


def quantizes(options: Options, linear: str) -> bool:
    """Whether this linear layer is quantized; GPTQ takes all of a decoder layer's."""
    return True


def quantization_config(options: Options, kept: Sequence[str] = ()) -> dict[str, object]:
    """As GPTQModel writes it, for config.json and quantize_config.json."""
    # GPTQModel's word for layers that are left out, by expressions.
    spared: dict[str, object] = {"dynamic": {rf"-:.*\.{re.escape(name)}$": {} for name in kept}} if kept else {}
    return spared | {
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "sym": options.sym,
        "lm_head": False,
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "meta": {
            "damp_percent": options.damping,
            # GPTQModel refuses to load a checkpoint that claims both.
            "act_group_aware": options.order == "group-aware" and not options.desc_act,
        },
    }


def quantize(layer: Layer, options: Options) -> tuple[Tensors, dict[str, float], list[str]]:
    """A decoder layer's tensors as stored, each linear's relative error, and warnings.

    The error is tr(E G E^T) / tr(W G W^T), the share of the layer's output power that is lost.
    """
    import torch

    tensors = {name: tensor for name, tensor in layer.tensors.items()}
    errors: dict[str, float] = {}
    warnings: list[str] = []
    for group in layer.structure.groups:
        for piece in pieces(layer, group):
            weight, gram = stacked(layer, piece.group), piece.gram
            power = output_power(layer, group) if piece.gradients is None else quadratic(weight, gram)
            size = gram.shape[0] if options.group_size == -1 else options.group_size
            order = column_order(gram, size, options)
            group_of = torch.arange(gram.shape[0], device=gram.device) // size
            if options.desc_act:
                # Act-order's groups are runs of the sorted columns, so the scales are those of the sorted matrix.
                group_of = torch.empty_like(group_of).scatter_(0, order, group_of)
            where = f"layer {layer.index} {piece.group.linears[0]}"
            factor = factored(gram, order, options.damping, where)
            rounded, grid = by_outputs(
                weight, piece, group_of, partial(_rounded, gram=gram, factor=factor, group_of=group_of, options=options)
            )
            if rounded.damping > options.damping:
                warnings.append(singular(where, rounded.damping))
            for linear, rows in row_slices(layer, piece.group):
                del tensors[f"{linear}.weight"]
                tensors[f"{linear}.qweight"] = pack(rounded.codes[:, rows], options.bits)
                # Version 1 of the format stores every zero less one.
                zeros = (grid.zero[:, rows] - 1).to(torch.uint8)
                tensors[f"{linear}.qzeros"] = pack(zeros.t(), options.bits).t().contiguous()
                tensors[f"{linear}.scales"] = grid.scale[:, rows].to(torch.float16).contiguous()
                tensors[f"{linear}.g_idx"] = group_of.to(torch.int32)
                errors[f"{linear}.weight"] = ratio(rounded.error[rows].sum(), power[rows].sum())
    return tensors, errors, warnings


def _rounded(weight: Any, *, gram: Any, factor: Factor, group_of: Any, options: Options) -> tuple[Rounded, Grid]:
    """Some channels' codes [in, some] and their grid."""
    inputs = gram.shape[0]
    size = inputs if options.group_size == -1 else options.group_size
    where = (weight, gram)
    if options.desc_act:
        where = (weight[factor.order], gram[factor.order][:, factor.order])
    grid = search_grid(*where, size, options.bits, symmetric=options.sym)
    return compensate(weight, gram, grid, group_of, factor.order, options.damping, factor=factor), grid


def column_order(gram: Any, size: int, options: Options) -> Any:
    """The order in which columns are rounded: the most important first, groups kept together unless act-order."""
    import torch

    diagonal = gram.diagonal()
    if options.desc_act:
        return torch.argsort(diagonal, descending=True, stable=True)
    if options.order == "natural":
        return torch.arange(gram.shape[0], device=gram.device)
    return group_aware_order(diagonal, size)


def pack(codes: Any, bits: int) -> Any:
    """Codes (uint8 [n, m]) as a stream of bits along the first axis, lowest first: int32 [n x bits / 32, m]."""
    import torch

    n, m = codes.shape
    common = math.gcd(bits, 32)
    values, words = 32 // common, bits // common
    if n % values:
        raise ValueError(f"{n} codes of {bits} bits do not fill whole 32-bit words")
    table = codes.reshape(n // values, values, m)
    packed = torch.zeros(n // values, words, m, dtype=torch.int32, device=codes.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        # int32 shifts drop the bits that leave the word, as wanted.
        value = (table[:, i] & (2**bits - 1)).to(torch.int32)
        packed[:, word] |= value << shift
        if shift + bits > 32:
            packed[:, word + 1] |= value >> (32 - shift)
    return packed.reshape(-1, m)


def unpack(packed: Any, bits: int) -> Any:
    """The inverse of `pack`: int32 [n x bits / 32, m] -> uint8 [n, m]."""
    import torch

    common = math.gcd(bits, 32)
    values, words = 32 // common, bits // common
    table = packed.reshape(-1, words, packed.shape[1]).long() & 0xFFFFFFFF
    codes = []
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = table[:, word] >> shift
        if shift + bits > 32:
            value = value | table[:, word + 1] << (32 - shift)
        codes.append((value & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, 1).reshape(-1, packed.shape[1])
