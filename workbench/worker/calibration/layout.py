"""A variant's checkpoint: every tensor's place is known before the first one is.

All sizes follow from the base's headers and the options, so the shards are laid out before the first layer: a full
disk shows at once, each tensor is written once at its final place, in whichever order, and what an interrupted run
has written is there for the next.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.worker.architectures import LAYERS, WAY_OUT
from workbench.worker.base.checkpoint import CONFIG_FILES, TOKENIZER_FILES
from workbench.worker.base.saving import for_both_readers, write_json
from workbench.worker.calibration.weights import Weights, derived
from workbench.worker.methods import CalibratedMethod
from workbench.worker.methods.grouped import STORED_BYTES, group_sizes

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 64_000_000
"""Unquantized tensors are converted and written in pieces of this size."""

Plan = dict[str, tuple[str, tuple[int, ...]]]
"""Every tensor of a checkpoint, in the order written: name -> (dtype, shape)."""


class Checkpoint:
    """A safetensors checkpoint laid out in advance: every tensor has its place before the first is known."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self.out, self.plan = out, plan
        shards: list[list[str]] = [[]]
        filled = self.total_bytes = 0
        for name, (kind, shape) in plan.items():
            size = STORED_BYTES[kind] * math.prod(shape)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            self.total_bytes += size
        self.places: dict[str, tuple[Path, int]] = {}
        self.heads: dict[Path, tuple[bytes, int]] = {}
        for number, names in enumerate(shards, 1):
            one = len(shards) == 1
            file = out / ("model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                kind, shape = plan[name]
                end = offset + STORED_BYTES[kind] * math.prod(shape)
                header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            head = struct.pack("<Q", len(text)) + text
            self.heads[file] = (head, len(head) + offset)
            for name in names:
                self.places[name] = (file, len(head) + header[name]["data_offsets"][0])

    def laid_out(self) -> bool:
        """Whether the files are there with this very layout."""
        for file, (head, size) in self.heads.items():
            if not file.is_file() or file.stat().st_size != size:
                return False
            with file.open("rb") as stream:
                if stream.read(len(head)) != head:
                    return False
        return True

    def lay_out(self) -> None:
        """Reserve the files, so that a full disk shows before the work and not after it."""
        self.out.mkdir(parents=True, exist_ok=True)
        for file, (head, size) in self.heads.items():
            file.unlink(missing_ok=True)
            reserve(file, size)
            with file.open("r+b") as stream:
                stream.write(head)

    def write(self, name: str, tensor: Any, offset_rows: int = 0) -> None:
        """Write a tensor, or some of its rows from `offset_rows` on, to its place."""
        import torch

        kind, shape = self.plan[name]
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}[kind]
        stored = tensor.to(dtype).contiguous().cpu()
        if tuple(stored.shape[1:]) != shape[1:]:
            raise AssertionError(f"{name} came out as {tuple(stored.shape)}, planned {shape}")
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise UserError(
                f"tensor '{name}' does not fit {kind} (its largest entry is {float(tensor.abs().max()):.3g}); "
                f"{WAY_OUT}."
            )
        file, place = self.places[name]
        place += offset_rows * math.prod(shape[1:]) * STORED_BYTES[kind]
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(memoryview(stored.view(torch.uint8).numpy() if stored.dim() else stored.numpy()).cast("B"))


def plan_of(weights: Weights, method: CalibratedMethod, options: Any) -> tuple[Plan, dict[str, str]]:
    """The tensors that a method with these options makes of a base, and what each tensor of the base becomes."""
    kept = {"float16": "F16", "bfloat16": "BF16"}[weights.architecture.family.dtype]
    linears = set(weights.architecture.linears)
    plan: Plan = {}
    types: dict[str, str] = {}
    for name in sorted(weights.files, key=_layer_order):
        if derived(name) or (name == "lm_head.weight" and weights.tied):
            continue
        shape = weights.shapes[name]
        parts = name.removeprefix(f"{LAYERS}.").split(".", 1)
        inside = parts[1].removesuffix(".weight") if name.startswith(f"{LAYERS}.") else ""
        if inside in linears and method.quantizes(options, name.removesuffix(".weight")):
            for suffix, entry in method.stored(options, inside, *shape).items():
                plan[f"{name.removesuffix('weight')}{suffix}"] = entry
            types[name] = method.tensor_type(options)
        else:
            plan[name] = (kept, shape)
            types[name] = kept
    return plan, types


def _layer_order(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    if name.startswith(f"{LAYERS}."):
        return int(name.removeprefix(f"{LAYERS}.").split(".", 1)[0]), name
    return (-1, name) if "embed" in name else (10**9, name)


def check_shapes(weights: Weights, name: str, method: CalibratedMethod, options: Any) -> None:
    """Refuse shapes that variant `name` cannot hold, naming the layer."""
    linears = {name: weights.shapes[f"{LAYERS}.0.{name}.weight"] for name in weights.architecture.linears}
    possible = [str(size) for size in group_sizes(columns for _, columns in linears.values())]
    for linear, (rows, columns) in linears.items():
        if method.quantizes(options, f"{LAYERS}.0.{linear}"):
            where = f"{name}: {LAYERS}.0.{linear} ({rows} x {columns})"
            method.check_linear(options, where, rows, columns, possible)


def finish(checkpoint: Checkpoint, weights: Weights, method: CalibratedMethod, options: Any) -> None:
    """Write what no layer holds: embeddings, norms, configuration, tokenizer, index."""
    import torch
    from safetensors import safe_open

    out = checkpoint.out
    for name in checkpoint.plan:
        if name.startswith(f"{LAYERS}."):
            continue
        with safe_open(weights.files[name], framework="pt") as file:
            source = file.get_slice(name)
            shape = source.get_shape()
            rows = max(1, COPY_BYTES // (4 * max(1, math.prod(shape[1:])))) if shape else 1
            for start in range(0, shape[0], rows):
                checkpoint.write(name, source[start : start + rows].to(torch.float32), start)
    if len(checkpoint.heads) > 1:
        weight_map = {name: file.name for name, (file, _) in sorted(checkpoint.places.items())}
        index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    for name in (*TOKENIZER_FILES, *CONFIG_FILES):
        if (weights.folder / name).is_file():
            shutil.copyfile(weights.folder / name, out / name)
    config = {key: value for key, value in weights.config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = weights.architecture.family.dtype
    quantization = method.quantization_config(options)
    config["quantization_config"] = quantization
    if weights.tied:
        config["tie_word_embeddings"] = True
    write_json(out / "config.json", for_both_readers(config))
    if method.CONFIG_FILE:
        write_json(out / method.CONFIG_FILE, quantization)


def reserve(file: Path, size: int) -> None:
    """A file of that many bytes, which the disk really has."""
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)
