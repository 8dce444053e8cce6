"""What an artifact's record says: its key, its provenance, its place in the cache, its bytes."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from workbench.errors import UserError
from workbench.home import entry, home, interpreter, stored
from workbench.machine.identity import program, versions
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Cost, PreparedBase, Variant, digest, to_json
from workbench.worker.methods import Making

ARTIFACT_VERSION = "0.1.0"
"""Version of the way artifacts are made, a part of every key. Raise it when the same input comes to give other bytes; a
release by itself makes nothing anew. It was the program's version once, hence its form."""


def python_of(making: Making) -> str:
    """The interpreter that does the work."""
    return interpreter(making.python, sys.executable) if making.python else sys.executable


def versions_of(making: Making) -> dict[str, str]:
    """Versions of what the bytes depend on, where the work is done; and of what made the file they are made from."""
    source = versions_of(making.source) if making.source else {}
    return source | versions(making.packages, python_of(making))


def base_key(recipe: Recipe) -> str:
    """Of the base in the cache, as its source is now."""
    from workbench.worker.base.prepare import identify

    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    source = recipe.base.source(recipe.path.parent)
    return digest([identify(source), equivalent, recipe.base.trust_remote_code])


def found_key(variant: Variant) -> str:
    """Of what others made, as it lies there now; its options name its place in full (`placed`)."""
    from workbench.worker.base.prepare import identify

    source = {key: variant.options[key] for key in ("hub", "path", "revision") if variant.options.get(key)}
    # Without the versions of the way bases are prepared.
    return identify(source).partition(":")[2]


def check(recipe: Recipe, base: PreparedBase, artifact: Artifact | None = None) -> None:
    """Raise `UserError` if the base's files, or those made of it, are not what they were when they were taken up: a run
    may last for days."""
    if artifact is not None and Path(artifact.path).is_relative_to(home() / "artifacts"):
        if stored("artifacts", artifact.digest, Artifact) is None:
            raise UserError(f"{artifact.path}: changed while the run went on; the next one makes it anew")
        return
    found = stored("bases", base_key(recipe), PreparedBase)
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    if found is None or digest([found.digest, equivalent]) != base.digest:
        raise UserError(f"{base.path}: the base changed while the run went on. Run it again to take it as it is")


def artifact_key(base: PreparedBase, variant: Variant, making: Making, more: list[object]) -> str:
    options = {name: value for name, value in variant.options.items() if name not in making.ignored}
    more = more + ([making.maker] if making.maker else [])
    more = more + ([versions(making.maker_packages, python_of(making))] if making.maker_packages else [])
    return digest([base.digest, variant.method, options, versions_of(making), ARTIFACT_VERSION, more])


def stored_artifact(key: str, variant: Variant, build: Callable[[Path], Artifact]) -> Artifact:
    return located(entry("artifacts", key, Artifact, build)[1], variant)


def located(artifact: Artifact, variant: Variant) -> Artifact:
    """An artifact of the cache by its full path and by a recipe's name; two may name the same bytes differently."""
    return replace(artifact, variant=variant.name, path=str(home() / "artifacts" / artifact.digest / artifact.path))


def provenance_of(
    recipe: Recipe, base: PreparedBase, variant: Variant, making: Making, cost: Cost | None, calibration: str | None
) -> dict[str, object]:
    return {
        "base": base.digest,
        "source": base.source,
        "revision": base.revision,
        "recipe": recipe.name,
        "recipe_digest": recipe.digest,
        "options": variant.options,
        "calibration": calibration,
        "versions": versions_of(making) | program(),
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
