"""A variant's checkpoint: every tensor's place is known before the first one is.

All sizes follow from the base's headers and the options, so the shards are laid out before the first layer: a full
disk shows at once, each tensor is written once at its final place, in whichever order, and what an interrupted run
has written is there for the next.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.front_matter import fields_of, stated_licence
from workbench.shape import DTYPE_CODES, DTYPES
from workbench.worker.base.checkpoint import TOKENIZER_FILES, lay_out
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_card, write_json
from workbench.worker.calibration.weights import Weights
from workbench.worker.layers import LAYERS, WAY_OUT, kept_dtype
from workbench.worker.methods import CalibratedMethod
from workbench.worker.methods.grouped import group_sizes

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 64_000_000
"""Unquantized tensors are converted and written in pieces of this size."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Every tensor of a checkpoint, in the order written: name -> (safetensors dtype, shape)."""


class Checkpoint:
    """A safetensors checkpoint laid out in advance: every tensor has its place before the first is known."""

    def __init__(self, out: Path, layout: Layout) -> None:
        from huggingface_hub import split_state_dict_into_shards_factory

        self.out, self.layout = out, layout
        self.shards = split_state_dict_into_shards_factory(
            {name: DTYPES[kind].size_bytes * math.prod(shape) for name, (kind, shape) in layout.items()},
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=SHARD_BYTES,
        )
        self.places: dict[str, tuple[Path, int]] = {}
        self.heads: dict[Path, tuple[bytes, int]] = {}
        for file, names in self.shards.filename_to_tensors.items():
            head, begins, size = lay_out({name: layout[name] for name in names}, {"format": "pt"})
            self.heads[out / file] = head, size
            self.places |= {name: (out / file, begin) for name, begin in begins.items()}

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

        kind, shape = self.layout[name]
        stored = tensor.to(getattr(torch, DTYPES[kind].name)).contiguous().cpu()
        if tuple(stored.shape[1:]) != shape[1:]:
            raise AssertionError(f"{name} came out as {tuple(stored.shape)}, planned {shape}")
        # torch does not ask that of 8 bits.
        asked = stored.float() if stored.element_size() == 1 else stored
        if stored.is_floating_point() and not bool(torch.isfinite(asked).all()):
            raise UserError(
                f"tensor '{name}' does not fit {kind} (its largest entry is {float(tensor.abs().max()):.3g}); "
                f"{WAY_OUT}."
            )
        file, place = self.places[name]
        place += offset_rows * math.prod(shape[1:]) * DTYPES[kind].size_bytes
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(memoryview(stored.reshape(-1).view(torch.uint8).numpy()))


def layout_of(weights: Weights, method: CalibratedMethod, options: Any) -> tuple[Layout, dict[str, str]]:
    """The tensors that a method with these options makes of a base, and the type that each of the base's becomes."""
    kept = DTYPE_CODES[kept_dtype(weights.config)]
    layout: Layout = {}
    types: dict[str, str] = {}
    for name in sorted(weights.tensors, key=_layer_order):
        if name == "lm_head.weight" and weights.tied:
            continue
        shape = weights.tensors[name].shape
        stem = name.removesuffix(".weight")
        inside = stem.split(".", 3)[-1] if name.startswith(f"{LAYERS}.") else ""
        linears = weights.structures[_layer_order(name)[0]].linears if inside else ()
        if name != stem and inside in linears and method.quantizes(options, stem):
            layout |= {f"{stem}.{suffix}": entry for suffix, entry in method.stored(options, inside, *shape).items()}
            types[name] = method.tensor_type(options)
        else:
            layout[name], types[name] = (kept, shape), kept
    return layout, types


def _layer_order(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    if name.startswith(f"{LAYERS}."):
        return int(name.removeprefix(f"{LAYERS}.").split(".", 1)[0]), name
    return (-1, name) if "embed" in name else (10**9, name)


def check_shapes(weights: Weights, name: str, method: CalibratedMethod, options: Any) -> None:
    """Refuse shapes that variant `name` cannot hold, naming the layer."""
    names = [f"{LAYERS}.{index}.{name}" for structure, index in weights.kinds().items() for name in structure.linears]
    linears = {name: weights.tensors[f"{name}.weight"].shape for name in names}
    possible = [str(size) for size in group_sizes(columns for _, columns in linears.values())]
    for linear, (rows, columns) in linears.items():
        if method.quantizes(options, linear):
            method.check_linear(options, f"{name}: {linear} ({rows} x {columns})", rows, columns, possible)


def finish(checkpoint: Checkpoint, weights: Weights, method: CalibratedMethod, options: Any) -> None:
    """Write what no layer holds: embeddings, norms, configuration, tokenizer, index, and a card: the base's own speaks
    of another model."""
    import torch
    from safetensors import safe_open

    out = checkpoint.out
    for name in checkpoint.layout:
        if name.startswith(f"{LAYERS}."):
            continue
        with safe_open(weights.tensors[name].file, framework="pt") as file:
            source = file.get_slice(name)
            shape = source.get_shape()
            rows = max(1, COPY_BYTES // (4 * max(1, math.prod(shape[1:])))) if shape else 1
            for start in range(0, shape[0], rows):
                checkpoint.write(name, source[start : start + rows].to(torch.float32), start)
    if checkpoint.shards.is_sharded:
        weight_map = dict(sorted(checkpoint.shards.tensor_to_filename.items()))
        index = {"metadata": checkpoint.shards.metadata, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    copy_side_files(weights.folder, out, (*TOKENIZER_FILES, "generation_config.json"))
    config = {key: value for key, value in weights.config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = kept_dtype(weights.config)
    kept = sorted({name for structure in weights.kinds() for name in structure.kept})
    # In full: what is part of a name to one reader is how a name begins or ends to another.
    stems = [name.removesuffix(".weight") for name in weights.matrices()]
    kept += [stem for stem in stems if not method.quantizes(options, stem)]
    quantization = method.quantization_config(options, kept)
    config["quantization_config"] = quantization
    if weights.tied:
        config["tie_word_embeddings"] = True
    write_json(out / "config.json", for_both_readers(config))
    card = weights.folder / "README.md"
    called = fields_of(card).get("model_name")
    write_card(
        out,
        called if isinstance(called, str) else None,
        stated_licence(card),
        f"A quantized form ({method.tensor_type(options)}, {quantization['quant_method']}) of "
        f"{called or 'its base'}, made by the Workbench. `workbench card` writes what was measured of it.",
    )
    if method.CONFIG_FILE:
        write_json(out / method.CONFIG_FILE, quantization)


def reserve(file: Path, size: int) -> None:
    """A file of that many bytes, which the disk really has."""
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)
