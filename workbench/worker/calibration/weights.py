"""The base's directory as its headers describe it; tensors are read when asked for.

A layer's tensors are read from memory-mapped files that are opened anew each time: closing drops the mapping, and
with it what was paged in, so what is resident does not grow with the layers read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.worker.architectures import LAYERS, WAY_OUT, Architecture, describe
from workbench.worker.base.checkpoint import checked_weights


@dataclass(frozen=True)
class Weights:
    """A base: its configuration, what it is as an architecture, and where each tensor lies."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    files: dict[str, Path]
    """Tensor -> the file it lies in."""
    shapes: dict[str, tuple[int, ...]]
    layers: int
    vocabulary: int

    @property
    def widest(self) -> int:
        """The most inputs of any linear layer."""
        return max(self.shapes[f"{LAYERS}.0.{name}.weight"][1] for name in self.architecture.linears)

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding; configurations that leave it out mean the class's default."""
        return "lm_head.weight" not in self.files or bool(self.config.get("tie_word_embeddings"))


def open_weights(folder: Path) -> Weights:
    """Read a base's headers. Raises `UserError` if it is no directory of an architecture in the table."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; the base must be a Hugging Face directory") from None
    architecture = describe(config)
    stored = checked_weights(folder)
    files = {name: tensor.file for name, tensor in stored.items()}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    layers = int(config["num_hidden_layers"])
    for index in range(layers):
        for linear in architecture.linears:
            name = f"{LAYERS}.{index}.{linear}.weight"
            if name not in shapes:
                raise UserError(
                    f"{folder}: tensor '{name}' is missing: not a plain {architecture.model_type} model. {WAY_OUT}."
                )
    return Weights(folder, config, architecture, files, shapes, layers, int(config["vocab_size"]))


def read_tensor(weights: Weights, name: str) -> Any:
    """A tensor in the dtype it is stored in."""
    from safetensors import safe_open

    with safe_open(weights.files[name], framework="pt") as file:
        return file.get_tensor(name)


def read_layer(weights: Weights, index: int, device: Any) -> dict[str, Any]:
    """A decoder layer's tensors in float32 on the device, by their names inside the layer."""
    import torch
    from safetensors import safe_open

    prefix = f"{LAYERS}.{index}."
    tensors: dict[str, Any] = {}
    wanted = sorted(name for name in weights.files if name.startswith(prefix) and not derived(name))
    for path in sorted({weights.files[name] for name in wanted}):
        with safe_open(path, framework="pt") as file:
            for name in wanted:
                if weights.files[name] == path:
                    tensor = file.get_tensor(name).to(device=device, dtype=torch.float32, copy=True)
                    if not torch.isfinite(tensor).all():
                        raise UserError(f"{path}: tensor '{name}' has NaN or infinite weights. Fetch it again.")
                    tensors[name.removeprefix(prefix)] = tensor
    return tensors


def derived(name: str) -> bool:
    """Buffers that old exporters saved and that the configuration determines."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"))
