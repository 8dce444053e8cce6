"""Weights that engines do not take as they are stored, as plain floats: float64 in float32, FP8 times its scales, and
what is packed (`quantized.py`).

No engine computes in float64, and each rounds it by itself or not at all. FP8 (DeepSeek's blocks of 128 x 128, or a
scale a tensor or a row, as compressed-tensors and others write them) is what some models are only published in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.shape import DTYPE_CODES
from workbench.worker import Progress
from workbench.worker.base.checkpoint import (
    FLOAT8,
    FLOAT8_SCALES,
    NOT_WEIGHTS,
    QUANTIZATION_KEYS,
    TOKENIZER_FILES,
    StoredTensor,
    packed_by,
    scale_of,
)
from workbench.worker.base.quantized import Quantized
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_json, write_weights

BESIDE = (*FLOAT8_SCALES, ".input_scale", ".k_scale", ".v_scale", ".q_scale", *NOT_WEIGHTS)
"""Ends of the names of tensors that are no weights: scales, and those of activations."""

BLOCK = (128, 128)
"""Rows and columns that share a scale where a configuration does not say (DeepSeek's)."""


def plain_dtype(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str | None:
    """What the weights have to be rewritten in, in torch's words; None where engines take them as they are."""
    kinds = {tensor.dtype for tensor in tensors.values()}
    if kinds & FLOAT8:
        stated = config.get("dtype") or config.get("torch_dtype")
        return stated if stated in ("float32", "float16") else "bfloat16"
    if packed_by(config, tensors):
        return Quantized(config, tensors).dtype
    return "float32" if "F64" in kinds else None


def as_plain(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights as they will be: their types and sizes, without what only quantized ones have."""
    dtype = plain_dtype(config, tensors)
    if not dtype:
        return dict(tensors)
    if _packed(config, tensors):
        return Quantized(config, tensors).plain()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(BESIDE)}
    return {name: tensor.of_type(DTYPE_CODES[dtype]) for name, tensor in kept.items()}


def _packed(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether it is not FP8, which compressed-tensors may be too."""
    return bool(packed_by(config, tensors)) and not {tensor.dtype for tensor in tensors.values()} & FLOAT8


def quantized_types(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The quantized types that the weights are stored in."""
    if _packed(config, tensors):
        return [Quantized(config, tensors).type]
    return sorted({tensor.dtype for tensor in tensors.values()} & FLOAT8)


def write_plain(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], out: Path, progress: Progress
) -> list[str]:
    """Write a directory's model as one of plain floats; what was done, in words. `tensors`: those of the model."""
    plain = as_plain(config, tensors)
    dtype = str(plain_dtype(config, tensors))

    blocks = (config.get("quantization_config") or {}).get("weight_block_size") or BLOCK

    def make(name: str) -> Any:
        scale = scale_of(name, tensors)
        weight = tensors[name].read(name)
        if scale is None or tensors[name].dtype not in FLOAT8:
            return weight
        factors = tensors[scale].read(scale).float()
        if factors.dim() < weight.dim():
            factors = factors.reshape(-1, *[1] * (weight.dim() - 1))
        for axis, size in enumerate(weight.shape):
            count = factors.shape[axis]
            if count not in (1, size):
                if count != -(-size // blocks[axis]):
                    raise UserError(f"{path}: {scale} has {count} scales for {size} values of {name}. Fetch it again.")
                factors = factors.repeat_interleave(blocks[axis], axis).narrow(axis, 0, size)
        return weight.float() * factors

    packed = Quantized(config, tensors) if _packed(config, tensors) else None
    making = packed.maker() if packed else make
    out.mkdir(parents=True, exist_ok=True)
    write_weights(
        out, {name: tensor.shape for name, tensor in plain.items()}, dtype, making, progress, f"writing {dtype}"
    )
    made = {key: value for key, value in config.items() if key not in (*QUANTIZATION_KEYS, "dtype", "torch_dtype")}
    write_json(out / "config.json", for_both_readers({**made, "dtype": dtype}))
    copy_side_files(path, out, ("generation_config.json", "README.md", *TOKENIZER_FILES))
    if packed:
        return [f"its weights are {packed.by} ({packed.type}): made and measured as what the codes mean, in {dtype}"]
    if not any(tensor.dtype in FLOAT8 for tensor in tensors.values()):
        return ["its weights are float64, which no engine computes in: made and measured in float32"]
    return [f"its weights are FP8 with scales: made and measured multiplied out, in {dtype}"]
