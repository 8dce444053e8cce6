"""The base's directory as its headers describe it; tensors are read when asked for.

A layer's tensors are read from memory-mapped files that are opened anew each time: closing drops the mapping, and
with it what was paged in, so what is resident does not grow with the layers read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.architectures import Sizes, sizes_of
from workbench.worker.base.checkpoint import StoredTensor, behind, checked_weights, read_json
from workbench.worker.calibration.discover import structures_of
from workbench.worker.layers import LAYERS, WAY_OUT, Stored, Structure

DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Buffers that old exporters saved and that the configuration determines."""
DRAFTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Entries that say how many layers behind the last draft tokens."""


@dataclass(frozen=True)
class Piece:
    """A tensor that a base's files hold as part of another, or by another name."""

    whole: str
    stored: Stored
    place: int
    expert: int | None

    def of(self, whole: Any) -> Any:
        """The tensor, of the one in the files or of a slice of that."""
        return self.stored.part(whole if self.expert is None else whole[self.expert], self.place)


@dataclass(frozen=True)
class Weights:
    """A base: its configuration, what its decoder layers are made of, and where each tensor lies."""

    folder: Path
    config: Mapping[str, Any]
    structures: tuple[Structure, ...]
    """Of each decoder layer."""
    tensors: dict[str, StoredTensor]
    """By the names that a layer has for them; experts one by one, however files have them."""
    pieces: Mapping[str, Piece] = field(default_factory=dict)
    drafts: int = 0
    """Tensors that are left out, of layers behind the last that draft tokens."""

    def warnings(self) -> list[str]:
        """What a variant's readers have to know."""
        said = f"left out: {self.drafts} tensors of layers that only draft tokens (multi-token prediction)"
        return [said] if self.drafts else []

    @cached_property
    def sizes(self) -> Sizes:
        """What the configuration says of them."""
        return sizes_of(self.config)

    @property
    def layers(self) -> int:
        """How many decoder layers."""
        return len(self.structures)

    def kinds(self) -> dict[Structure, int]:
        """Each structure and the first layer that has it."""
        return {structure: self.structures.index(structure) for structure in dict.fromkeys(self.structures)}

    def matrices(self) -> list[str]:
        """The names of all weights of linear layers of decoder layers."""
        return [
            f"{LAYERS}.{index}.{name}.weight"
            for index, structure in enumerate(self.structures)
            for name in structure.linears
        ]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of the last change (ns) of each file: with others it is not the base that it was."""
        files = sorted({tensor.file for tensor in self.tensors.values()})
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    @property
    def widest(self) -> int:
        """The most inputs of any linear layer."""
        return max(
            self.tensors[f"{LAYERS}.{index}.{name}.weight"].shape[1]
            for structure, index in self.kinds().items()
            for name in structure.linears
        )

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding; configurations that leave it out mean the class's default."""
        return "lm_head.weight" not in self.tensors or bool(self.config.get("tie_word_embeddings"))


def open_weights(folder: Path) -> Weights:
    """Read a base's headers. Raises `UserError` if it is no directory of a model whose layers can be run."""
    config = read_json(folder / "config.json")
    structures = structures_of(config)
    found = {name: tensor for name, tensor in checked_weights(folder).items() if not name.endswith(DERIVED)}
    tensors = {name: tensor for name, tensor in found.items() if not behind(name, len(structures))}
    drafts = len(found) - len(tensors)
    if drafts:
        config = config | {key: 0 for key in DRAFTS if key in config}
    weights = Weights(folder, config, structures, *_taken_apart(structures, tensors), drafts)
    for name in weights.matrices():
        if name not in weights.tensors:
            raise UserError(
                f"{folder}: tensor '{name}' is missing: not a plain {config['model_type']} model. {WAY_OUT}."
            )
    return weights


def _taken_apart(
    structures: tuple[Structure, ...], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, Piece]]:
    """A base's tensors by the names that its layers have for them, and which of them are pieces of what."""
    import torch

    found, pieces = dict(tensors), dict[str, Piece]()
    for index, structure in enumerate(structures):
        for stored in structure.stored:
            whole = next((name for each in stored.names if (name := f"{LAYERS}.{index}.{each}") in tensors), None)
            if whole is None:
                continue  # Whoever looks for its parts says so.
            tensor = found.pop(whole)
            for place, part in enumerate(stored.parts):
                for expert in range(tensor.shape[0]) if "{}" in part else (None,):
                    piece = Piece(whole, stored, place, expert)
                    shape = tuple(piece.of(torch.empty(tensor.shape, device="meta")).shape)
                    name = f"{LAYERS}.{index}.{part.format(expert)}"
                    pieces[name], found[name] = piece, replace(tensor, shape=shape).of_type(tensor.dtype)
    return found, pieces


def read_tensor(weights: Weights, name: str) -> Any:
    """A tensor in the dtype it is stored in."""
    from safetensors import safe_open

    with safe_open(weights.tensors[name].file, framework="pt") as file:
        return file.get_tensor(name)


def read_layer(weights: Weights, index: int, device: Any) -> Tensors:
    """A decoder layer's tensors in float32 on the device, by their names inside the layer."""
    import torch
    from safetensors import safe_open

    prefix = f"{LAYERS}.{index}."
    wanted = sorted((tensor.file, name) for name, tensor in weights.tensors.items() if name.startswith(prefix))
    tensors: Tensors = {}
    for path in dict.fromkeys(path for path, _ in wanted):
        with safe_open(path, framework="pt") as file:
            for name in (name for where, name in wanted if where == path):
                piece = weights.pieces.get(name)
                if piece is None:
                    tensor = file.get_tensor(name)
                elif piece.expert is None:
                    tensor = piece.of(file.get_tensor(piece.whole))
                else:
                    tensor = piece.of(file.get_slice(piece.whole))
                tensor = tensor.to(device=device, dtype=torch.float32, copy=True).contiguous()
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: tensor '{name}' has NaN or infinite weights. Fetch it again.")
                tensors[name.removeprefix(prefix)] = tensor
    return tensors
