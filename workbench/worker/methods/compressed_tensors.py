"""compressed-tensors with 8-bit weights and inputs, in llm-compressor's schemes W8A8 and FP8_DYNAMIC.

Both have a scale a row of a matrix, and engines round inputs to 8 bits with a scale a token, found as they come. W8A8's
weights are integers, rounded with GPTQ's error feedback (`gptq.py`); FP8's are rounded to nearest, since feedback
presumes that a grid's points lie evenly.

Four bits with 16-bit inputs (W4A16) are AWQ's and GPTQ's own codes: `compressed-tensors: {from: VARIANT}`
(`worker/compressed_folder.py`). What others wrote is read here too, as far as a configuration and shapes tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workbench.errors import UserError, short
from workbench.shape import Shape, Stored
from workbench.worker import Tensors
from workbench.worker.layers import Layer
from workbench.worker.methods import Making, grouped, rounding

SHORTHAND = "scheme"
AXES = ("scheme",)
WRITES: tuple[str, ...] = ("compressed-tensors",)
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ("compressed-tensors", "8-bit")
CONFIG_FILE = ""

DAMPING = 0.01
"""Of the error feedback, as a fraction of the Gram matrix's mean diagonal."""
LARGEST_FP8 = 448.0
"""Of float8_e4m3fn."""
LAYOUTS = {"W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized"}
READ = ("pack-quantized", *LAYOUTS.values(), "naive-quantized")
"""Layouts that the engines load."""
BESIDE = (
    *(f".weight_{part}" for part in ("scale", "shape", "zero_point", "g_idx", "global_scale")),
    *(f".{what}_{part}" for what in ("input", "output") for part in ("scale", "zero_point", "global_scale")),
)
"""Ends of the names of tensors beside a quantized weight."""
CARRIED = "compressed-tensors are carried to no other format; give the AWQ or GPTQ checkpoint, or a GGUF file"


@dataclass(frozen=True)
class Options:
    """A safetensors checkpoint of 8-bit weights for 8-bit inputs; its scheme alone may stand for all options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    scheme: Literal["W8A8", "FP8_DYNAMIC"] = "W8A8"
    """Integers or floats of 8 bits, by llm-compressor's names."""


def default_name(options: Options) -> str:
    """`compressed-tensors-W8A8`."""
    return f"compressed-tensors-{options.scheme}"


def check(options: Options) -> None:
    """Every scheme can be made."""


def limits(options: Options) -> dict[str, str]:
    """Which device computes with FP8 the engine knows."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """In the calibration pass."""
    return Making("pass", "tokens", ("torch", "transformers"))


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """What the checkpoint will hold."""
    return grouped.checkpoint_sizes(shape, options, quantizes, stored)


# --- what the pass asks of a method -------------------------------------------------------------


def check_linear(options: Options, where: str, rows: int, columns: int, possible: list[str]) -> None:
    """Every shape will do."""


def quantizes(options: Options, linear: str) -> bool:
    """All of a decoder layer's."""
    return True


def stored(options: Options, linear: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors a linear layer becomes: suffix -> (safetensors dtype, shape). The bias is the caller's."""
    return {
        "weight": ("I8" if options.scheme == "W8A8" else "F8_E4M3", (rows, columns)),
        "weight_scale": ("F32", (rows, 1)),
    }


def tensor_type(options: Options) -> str:
    """What a quantized tensor is called in an artifact's record."""
    return options.scheme


def quantization_config(options: Options, kept: Sequence[str] = ()) -> dict[str, object]:
    """As compressed-tensors writes it, for config.json."""
    kind = "int" if options.scheme == "W8A8" else "float"
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return written(
        LAYOUTS[options.scheme], weights, inputs, ["lm_head", *(rf"re:.*\.{re.escape(name)}$" for name in kept)]
    )


def written(
    layout: str, weights: Mapping[str, object], inputs: Mapping[str, object] | None, ignore: list[str]
) -> dict[str, object]:
    """A `quantization_config` of compressed-tensors: one scheme for all linear layers but those of `ignore`."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": layout}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantize(layer: Layer, options: Options) -> tuple[Tensors, dict[str, float], list[str]]:
    """A decoder layer's tensors as stored, each linear's relative error, and warnings."""
    tensors, errors, warnings = dict(layer.tensors), dict[str, float](), list[str]()
    for group in layer.structure.groups:
        gram, weight = layer.grams[group.linears[0]], rounding.stacked(layer, group)
        if options.scheme == "W8A8":
            where = f"layer {layer.index} {group.linears[0]}"
            codes, scale, lost, damping = _integers(weight, gram, where)
            warnings += [rounding.singular(where, damping)] if damping > DAMPING else []
        else:
            codes, scale, lost = _floats(weight, gram)
        power = rounding.output_power(layer, group)
        for linear, rows in rounding.row_slices(layer, group):
            tensors[f"{linear}.weight"] = codes[:, rows].t().contiguous()
            tensors[f"{linear}.weight_scale"] = scale[rows, None].contiguous()
            errors[f"{linear}.weight"] = rounding.ratio(lost[rows].sum(), power[rows].sum())
    return tensors, errors, warnings


def _integers(weight: Any, gram: Any, where: str) -> tuple[Any, Any, Any, float]:
    """Codes int8 [in, out], scales [out], the error e G e^T of each output, and the damping that it took."""
    import torch

    inputs = weight.shape[0]
    grid = rounding.search_grid(weight, gram, inputs, 8, symmetric=True)
    order = rounding.group_aware_order(gram.diagonal(), inputs)
    one_group = torch.zeros(inputs, dtype=torch.int64, device=weight.device)
    made = rounding.compensate(weight, gram, grid, one_group, order, DAMPING, where)
    return (made.codes.short() - 128).to(torch.int8), grid.scale[0], made.error, made.damping


def _floats(weight: Any, gram: Any) -> tuple[Any, Any, Any]:
    """Codes float8 [in, out], scales [out], and the error e G e^T of each output."""
    import torch

    scale = (weight.abs().amax(0) / LARGEST_FP8).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (weight / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
    return codes, scale, rounding.quadratic(weight - codes.float() * scale, gram)


# --- what others wrote --------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """How a checkpoint of others is packed, as its `quantization_config` says."""

    kind: str
    """Of a weight, such as `int4-g128`."""
    bits: int
    inputs: str
    """What engines round inputs to; empty where they do not."""


def read(said: Mapping[str, Any], name: str) -> Written:
    """What a `quantization_config` says. `UserError` for layouts that engines do not load, and several in one model."""
    groups = said.get("config_groups")
    found = [each for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    if not found or not all(isinstance(each.get("weights"), dict) for each in found):
        raise UserError(f"{name}: its quantization_config names no `config_groups` with weights. Fetch it again")
    layouts = {str(each.get("format") or said.get("format")) for each in found}
    kinds = {_kind(each["weights"], name) for each in found}
    if len(layouts) > 1 or len(kinds) > 1 or not layouts <= {*READ}:
        raise UserError(
            f"{name} is packed as {short(' and '.join(sorted(layouts)))}: what is read of compressed-tensors is one of "
            f"{', '.join(READ)}, the same for all layers"
        )
    inputs = found[0].get("input_activations")
    return Written(kinds.pop(), int(found[0]["weights"]["num_bits"]), _kind(inputs, name) if inputs else "")


def _kind(args: Mapping[str, Any], name: str) -> str:
    bits, kind, size = args.get("num_bits"), args.get("type", "int"), args.get("group_size")
    if bits not in (4, 8) or kind not in ("int", "float"):
        raise UserError(f"{name}: its quantization_config has {short(bits)} bits of type {short(kind)}, not 4 or 8")
    return f"{kind}{bits}" + (f"-g{size}" if type(size) is int and size > 0 else "")


def unpacked(shapes: Mapping[str, Sequence[int]], how: Written, name: str) -> dict[str, list[int]]:
    """Shapes of what tensors of these shapes unpack to, by the base's names. `UserError` where nothing is packed, or
    without its scale."""
    found = {}
    for key, shape in shapes.items():
        if key.endswith(BESIDE):
            continue
        stem, packed = key.removesuffix("_packed"), key.endswith(".weight_packed")
        found[stem] = [*shape[:-1], shape[-1] * (32 // how.bits)] if packed else list(shape)
        if packed and f"{stem}_scale" not in shapes:
            raise UserError(f"{name}: tensor {stem}_scale is missing. Fetch it again")
    if not any(key.endswith(".weight_scale") for key in shapes):
        raise UserError(f"{name} is no quantized checkpoint: none of its weights has a scale. Fetch it again")
    return found
