"""The base as a Hugging Face directory of the program's own, checked, rewritten where the recipe asks for it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.home import entry
from workbench.machine.work import work
from workbench.recipe.load import Recipe
from workbench.records import Artifact, BaseRequest, PreparedBase, digest, to_json


def prepare(recipe: Recipe, show: Show) -> PreparedBase:
    """The base, downloaded, de-quantized, rewritten, or just found."""
    from workbench.worker.base.prepare import identify

    source = recipe.base.source(recipe.path.parent)
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    key = digest([identify(source), equivalent, recipe.base.trust_remote_code])

    def build(folder: Path) -> PreparedBase:
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        out = folder / recipe.model
        out.mkdir()
        made, cost = work(
            "workbench.worker.base.prepare:prepare",
            BaseRequest(source, equivalent, str(out), recipe.base.trust_remote_code),
            PreparedBase,
            show,
            f"base: {recipe.model}",
            limit_s=recipe.limits.quantize_s,
        )
        # Inside the entry, whatever the cache folder is called later.
        path = recipe.model if Path(made.path) == out else made.path
        return replace(made, path=path, source=source, cost=cost)

    folder, base = entry("bases", key, PreparedBase, build)
    path = folder / base.path
    if not path.exists():
        shutil.rmtree(folder)
        return prepare(recipe, show)
    return replace(base, path=str(path), digest=digest([base.digest, equivalent]))


def base_artifact(base: PreparedBase) -> Artifact:
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Artifact(
        variant="base",
        method="base",
        format="safetensors",
        path=base.path,
        digest=base.digest,
        disk_bytes=base.weight_bytes,
        parameters=base.parameters,
        tensor_types={"*": types.get(base.dtype, base.dtype)},
        provenance={"source": base.source, "revision": base.revision, "cost": to_json(base.cost)},
    )
