"""AWQ from Gram matrices, written as AutoAWQ's "gemm" checkpoint.

AWQ (arXiv 2306.00978) multiplies the columns of a linear layer by scales s before rounding and divides its input
by the same, so that inputs that matter fall on a finer grid; the division is folded into whatever produced the
input (`layers.Producer`). The scales are importance^a / size^(1 - a) for the best of a row of exponents a, where
size is that of a column's weights beside the largest of their group. (Why that form: a group's step grows as the
p-norm of its scaled weights for some p, and minimising step^2 x sum(importance^2 / s^2) gives a = 2 / (p + 2).)
AutoAWQ finds a by running the layer on the calibration tokens for each. But the error it measures,
|(Q(W s) / s - W) X|^2, is N tr(E G E^T): with G known the tokens are not needed, and a sample of the output channels
ranks the exponents as well as all of them. Folding turns G into D^-1 G D^-1 for the rounding that follows.

Rounding is to the nearest point of a grid searched with G's diagonal blocks (AutoAWQ's clipping, without its
tokens), or `compensated`: GPTQ's error feedback inside the same layout, which takes any asymmetric 4-bit groups.

Rejected: leaving q and k unclipped as AutoAWQ does (its reason was the attention scores, which it does not measure
when it clips; here the search weighs the outputs and clipping them loses nothing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from workbench.errors import UserError
from workbench.shape import Shape, Stored
from workbench.worker import Tensors
from workbench.worker.layers import LAYERS, Group, Layer, Producer, fold, producing_rows
from workbench.worker.methods import Making, grouped, rounding
from workbench.worker.methods.both_sides import by_outputs, pieces
from workbench.worker.methods.feedback import Factor, factored

SHORTHAND = ""
LATER = ("objective",)
WRITES: tuple[str, ...] = ("awq", "gguf", "mlx", "compressed-tensors", "whole")
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ("awq", "4-bit")
CONFIG_FILE = ""

EXPONENTS = 20
"""Exponents tried: 0, 1/20, ... 19/20, as AutoAWQ does."""
SAMPLE = 384
"""Output channels that rank the exponents, spread evenly over the layer's."""
LARGEST_SCALE = 256.0
"""Scales stay within 1/256 ... 256, so that folding leaves float16's range alone."""
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a packed word holds column NIBBLES[i] of its eight (AutoAWQ's order for its CUDA kernel)."""


@dataclass(frozen=True)
class Options:
    """A safetensors checkpoint with 4-bit groups, scaled by what the calibration pass finds important."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    bits: Literal[4] = 4
    """The format's only width."""
    group_size: int = 128
    """Inputs that share a scale; -1: a whole row."""
    zero_point: bool = True
    """Asymmetric groups; vLLM and llama.cpp load no others."""
    rounding: Literal["nearest", "compensated"] = "nearest"
    """`compensated` adds GPTQ's error feedback."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Linear layers that stay in 16 bits, by parts of their names."""
    damping: float = 0.05
    """Added to the diagonal of the inputs' Gram matrix, as a fraction of its mean; for `rounding: compensated`."""
    objective: Literal["input", "output"] = "input"
    """What rounding keeps: the layer's outputs, or what the model says, by gradients; the latter takes a pass of its
    own, on the default model five times as long."""
    engine: Literal["workbench", "gptqmodel"] = "workbench"
    """Who makes it; `gptqmodel`: the library GPTQModel, also for architectures that the workbench does not know."""


def default_name(options: Options) -> str:
    """`awq-4bit-g128` or `awq-4bit-g128-compensated`, with what differs from the defaults after it."""
    parts = [f"awq-{options.bits}bit", "row" if options.group_size == -1 else f"g{options.group_size}"]
    parts += [] if options.zero_point else ["sym"]
    parts += ["compensated"] if options.rounding == "compensated" else []
    parts += ["output"] if options.objective == "output" else []
    parts += [options.engine] if options.engine != "workbench" else []
    return "-".join(parts)


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what no checkpoint of this format can hold."""
    rounding.check_grid("awq", options.group_size, options.damping)
    grouped.check_objective("awq", options)
    if "" in options.modules_to_not_convert:
        raise UserError("awq: modules_to_not_convert: an empty word is part of every name; leave it out")
    if options.engine == "gptqmodel" and options.rounding == "compensated":
        raise UserError("awq: `rounding: compensated` is the workbench's own; leave out `engine: gptqmodel`")


def limits(options: Options) -> dict[str, str]:
    """Backend name -> why that engine cannot load a checkpoint with these options, nor what it is carried to."""
    if options.zero_point:
        return grouped.carried_limits(options)
    said = "AWQ without zero points is carried to no other format; take GPTQ, or leave `zero_point` out"
    return {"vllm": "vLLM loads AWQ only with zero points", "llamacpp": said, "mlx": said}


def making(options: Options, cuda: bool) -> Making:
    """In the calibration pass, or by GPTQModel."""
    return grouped.making("awq", options)


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """What the checkpoint will hold, or what it is carried to."""
    if form == "mlx":
        return grouped.mlx_sizes(shape, options, quantizes)
    if form == "compressed-tensors":
        return grouped.compressed_sizes(shape, options, quantizes)
    if form == "gguf":
        return grouped.carried_sizes(shape, options, quantizes, "Q4_1")
    return grouped.sizes(shape, options, quantizes, stored)


# --- what the pass asks of a method -------------------------------------------------------------

check_linear = grouped.check_linear
tensor_type = grouped.tensor_type


def quantizes(options: Options, linear: str) -> bool:
    """Whether this linear layer (its full name) is quantized."""
    return not any(part in linear for part in options.modules_to_not_convert)


def stored(options: Options, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors a linear layer becomes: suffix -> (safetensors dtype, shape). The bias is the caller's."""
    size = columns if options.group_size == -1 else options.group_size
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (columns // size, rows // 8)),
        "scales": ("F16", (columns // size, rows)),
    }


def quantization_config(options: Options, kept: Sequence[str] = ()) -> dict[str, object]:
    """As AutoAWQ writes it, for config.json; of `options.modules_to_not_convert`, parts of names, the full names are
    among `kept`, for each reader has a rule of its own for parts."""
    return {
        "quant_method": "awq",
        "bits": options.bits,
        "group_size": options.group_size,
        "zero_point": options.zero_point,
        "version": "gemm",
        "modules_to_not_convert": [*kept] or None,
    }


def quantize(layer: Layer, options: Options) -> tuple[Tensors, dict[str, float], list[str]]:
    """A decoder layer's tensors as stored (producers folded), each linear's relative error, and warnings."""
    import torch

    errors: dict[str, float] = {}
    warnings: list[str] = []
    skipped = [name for name in layer.structure.linears if not quantizes(options, f"{LAYERS}.{layer.index}.{name}")]
    folds = [
        (group, None if set(group.linears) <= set(skipped) else _scales(layer, group, options))
        for group in layer.structure.groups
    ]
    tensors = dict(layer.tensors)
    for group, scales in folds:
        if scales is not None:
            fold(tensors, group, scales)
    for group, scales in folds:
        if set(group.linears) <= set(skipped):
            continue
        # The rows of v and up were divided by the scales of what they feed; compare like with like.
        divisors = _divisors(layer, group, folds)
        for piece in pieces(layer, group):
            if set(piece.group.linears) <= set(skipped):
                continue
            power = rounding.output_power(layer, group)
            if piece.gradients is not None:
                power = rounding.quadratic(rounding.stacked(layer, piece.group), piece.gram)
            gram, gradients = piece.gram, piece.gradients
            if scales is not None:
                gram = (gram / scales[:, None]).div_(scales)
            if gradients is not None and piece.group.linears[0] in divisors:
                gradients = _scaled(gradients, divisors[piece.group.linears[0]])
            weight = torch.cat([tensors[f"{name}.weight"] for name in piece.group.linears]).t().contiguous()
            size = gram.shape[0] if options.group_size == -1 else options.group_size
            group_of = torch.arange(gram.shape[0], device=gram.device) // size
            where = f"layer {layer.index} {piece.group.linears[0]}"
            factor = None
            if options.rounding == "compensated":
                order = rounding.group_aware_order(gram.diagonal(), size)
                factor = factored(gram, order, options.damping, where)
            rounded, grid = by_outputs(
                weight,
                replace(piece, gram=gram, gradients=gradients),
                group_of,
                partial(_rounded, gram=gram, group_of=group_of, factor=factor, options=options),
            )
            if factor and rounded.damping > options.damping:
                warnings.append(rounding.singular(where, rounded.damping))
            for linear, rows in rounding.row_slices(layer, piece.group):
                if linear in skipped:
                    continue
                del tensors[f"{linear}.weight"]
                tensors[f"{linear}.qweight"] = pack(rounded.codes[:, rows])
                tensors[f"{linear}.qzeros"] = pack(grid.zero[:, rows].to(torch.uint8))
                tensors[f"{linear}.scales"] = grid.scale[:, rows].to(torch.float16).contiguous()
                whole = power[rows]
                if linear in divisors:
                    whole = whole / divisors[linear].square()
                errors[f"{linear}.weight"] = rounding.ratio(rounded.error[rows].sum(), whole.sum())
    return tensors, errors, warnings


# --- scales -------------------------------------------------------------------------------------


def _scales(layer: Layer, group: Group, options: Options) -> Any:
    """The best scales for a group's input channels, [in], or None if plain rounding is best or all that there is.

    Shared by all AWQ variants with the same grid, so computed once.
    """
    if group.producer is None:
        return None
    key = ("awq scales", group.linears, options.group_size, options.zero_point)
    if key not in layer.shared:
        gram = layer.grams[group.linears[0]]
        size = gram.shape[0] if options.group_size == -1 else options.group_size
        weight = rounding.stacked(layer, group)
        layer.shared[key] = search_scales(weight, gram, size, options, group.producer)
    return layer.shared[key]


def search_scales(weight: Any, gram: Any, size: int, options: Options, producer: Producer) -> Any:
    """Scales [in] that minimise tr(E G E^T), E = Q(W s)/s - W, over the exponents (module docstring).

    `weight` [in, out], `gram` [in, in]; the importance is the root mean square of each input. Channels that
    share a producing row (grouped-query attention) share a scale. Channels that never fire keep scale 1. None where
    no scales are better than none.
    """
    import torch

    inputs, outputs = weight.shape
    every = max(1, outputs // SAMPLE)
    sample = weight[:, ::every].contiguous()
    importance = _over_heads(gram.diagonal().clamp(min=0), producer).sqrt()
    live = importance > 0
    if not bool(live.any()):
        return None
    size_in_group = _over_heads(_relative_size(weight, size), producer)
    tried: dict[int | None, tuple[float, Any]] = {}

    def attempt(step: int | None) -> float:
        if step not in tried:
            scales = None
            error = sample
            if step is not None:
                exponent = step / EXPONENTS
                scales = importance.clamp(min=1e-12).pow(exponent) / size_in_group.pow(1 - exponent)
                used = scales[live]
                scales = scales / (used.max() * used.min()).sqrt()
                scales = torch.where(live, scales, torch.ones_like(scales)).clamp_(1 / LARGEST_SCALE, LARGEST_SCALE)
                error = sample * scales[:, None]
            error = _rounding_error(error.clone() if scales is None else error, size, options)
            if scales is not None:
                error.div_(scales[:, None])
            tried[step] = (float(rounding.quadratic(error, gram).sum()), scales)
        return tried[step][0]

    # The error is smooth in the exponent: every second one first, then the neighbours of the best.
    best = min(range(0, EXPONENTS, 2), key=attempt)
    near: list[int | None] = [step for step in (best, best - 1, best + 1) if 0 <= step < EXPONENTS]
    return tried[min([*near, None], key=attempt)][1]


def _over_heads(values: Any, producer: Producer) -> Any:
    """The mean over channels that share a producing row, in each one's place: [in] -> [in]."""
    if producer.repeats == 1:
        return values
    table = values.view(-1, producer.repeats, producer.head_dim)
    return table.mean(1, keepdim=True).expand_as(table).reshape(-1)


def _relative_size(weight: Any, size: int) -> Any:
    """How large an input channel's weights are beside the largest of their groups, root mean square: [in]."""
    table = weight.view(-1, size, weight.shape[1])
    largest = table.abs().amax(1, keepdim=True).clamp_(min=1e-12)
    return (table / largest).square_().mean(2).sqrt_().clamp_(min=1e-4).view(-1)


def _rounding_error(weight: Any, size: int, options: Options) -> Any:
    """W - Q(W) for plain rounding over each group's whole range; [in, out], in place of `weight`."""
    import torch

    table = weight.view(-1, size, weight.shape[1])
    top = 2**options.bits - 1
    if options.zero_point:
        low, high = table.amin(1, keepdim=True).clamp_(max=0), table.amax(1, keepdim=True).clamp_(min=0)
        scale = rounding.as_half((high - low) / top)
        zero = (-low / scale).round_().clamp_(0, top)
    else:
        scale = rounding.as_half(table.abs().amax(1, keepdim=True) / (top / 2))
        zero = torch.full_like(scale, float((top + 1) // 2))
    code = (table / scale).round_().add_(zero).clamp_(0, top)
    return table.sub_(code.sub_(zero).mul_(scale)).view_as(weight)


def _divisors(layer: Layer, group: Group, folds: list[tuple[Group, Any]]) -> Tensors:
    """What the rows of a group's linear layers were divided by for the groups that they feed: linear -> [out]."""
    found: Tensors = {}
    for other, scales in folds:
        producer = other.producer
        if scales is not None and producer and producer.kind == "linear" and producer.module in group.linears:
            rows = layer.tensors[f"{producer.module}.weight"].shape[0]
            found[producer.module] = producing_rows(producer, scales, rows) * found.get(producer.module, 1.0)
    return found


def _scaled(gradients: Any, divisors: Any) -> Any:
    """Gradients' matrices [runs, length, length] by outputs that were divided by these [out]: a change counts as much
    more."""
    import torch

    runs, length, _ = gradients.shape
    factors = torch.nn.functional.pad(divisors, (0, runs * length - len(divisors))).view(runs, length)
    return gradients * factors[:, :, None] * factors[:, None, :]


def _rounded(
    weight: Any, *, gram: Any, group_of: Any, factor: Factor | None, options: Options
) -> tuple[rounding.Rounded, rounding.Grid]:
    """Some channels' codes [in, some] and their grid; with error feedback where there is a factor."""
    size = gram.shape[0] if options.group_size == -1 else options.group_size
    grid = rounding.search_grid(
        weight, gram, size, options.bits, symmetric=not options.zero_point, blocks=factor is None, lowest_zero=0
    )
    if factor:
        made = rounding.compensate(weight, gram, grid, group_of, factor.order, options.damping, factor=factor)
        return made, grid
    codes, error = rounding.nearest(weight, grid)
    return rounding.Rounded(codes, rounding.quadratic(error, gram), 0.0), grid


# --- layout -------------------------------------------------------------------------------------


def pack(codes: Any) -> Any:
    """Codes (uint8 [n, out]) packed along out in AutoAWQ's nibble order: int32 [n, out / 8]."""
    import torch

    table = codes.reshape(codes.shape[0], -1, 8)
    packed = torch.zeros(table.shape[:2], dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(NIBBLES):
        packed |= table[:, :, column].to(torch.int32) << (4 * nibble)
    return packed
