"""Gram matrices on the disk: G = mean(x x^T) of every distinct input of linear layers, for whoever rounds afterwards.

A file a layer, as safetensors: each matrix under the GGUF name of the first tensor that has it as its input, with the
other tensors' names in the metadata. Only the entries on and above the diagonal are kept, row after row: float32
[in (in + 1) / 2].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.disk import write_whole


def write(folder: Path, layer: int, matrices: Mapping[tuple[str, ...], Any]) -> None:
    """Write a layer's into a folder, which is made: names of the tensors that share an input -> float32 [in, in]."""
    import torch
    from safetensors.torch import save

    packed = {names[0]: torch.cat([row[i:] for i, row in enumerate(gram.cpu())]) for names, gram in matrices.items()}
    folder.mkdir(parents=True, exist_ok=True)
    first = {name: names[0] for names in matrices for name in names}
    write_whole(folder / f"grams-{layer:05d}.safetensors", save(packed, metadata=first))


@dataclass(frozen=True)
class Grams:
    """The matrices of a folder, read when asked for."""

    files: Mapping[str, Path]
    """By GGUF name of a tensor."""
    first: Mapping[str, str]
    """The same: under which name its matrix is stored."""

    def has(self, name: str, columns: int) -> bool:
        """Whether there is a matrix for a tensor with so many columns."""
        from safetensors import safe_open

        if name not in self.files:
            return False
        with safe_open(self.files[name], framework="pt") as file:
            return bool(file.get_slice(self.first[name]).get_shape() == [columns * (columns + 1) // 2])

    def load(self, name: str) -> Any:
        """A tensor's matrix, float32 [in, in]."""
        import torch
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            packed = file.get_tensor(self.first[name])
        size = math.isqrt(2 * len(packed))
        gram = torch.empty(size, size)
        start = 0
        for i in range(size):
            gram[i, i:] = gram[i:, i] = packed[start : start + size - i]
            start += size - i
        return gram


def read(folder: Path) -> Grams:
    """The matrices of a folder."""
    from safetensors import safe_open

    files, first = dict[str, Path](), dict[str, str]()
    for path in sorted(folder.glob("grams-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        files |= dict.fromkeys(metadata, path)
        first |= metadata
    return Grams(files, first)
