"""The base as a Hugging Face directory of the program's own, checked, rewritten where the recipe asks for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from workbench.console import Show
from workbench.home import entry
from workbench.machine.work import work
from workbench.recipe.load import Recipe
from workbench.records import Artifact, digest, to_json


def prepare(recipe: Recipe, show: Show) -> dict[str, Any]:
    """The base as a Hugging Face directory: `path`, `digest`, `dtype`, `parameters`, `weight_bytes`..."""
    from workbench.worker.base.prepare import identify

    source = recipe.base.source(recipe.path.parent)
    equivalent = to_json(recipe.base.equivalent.model_dump()) if recipe.base.equivalent else None
    key = digest([identify(source), equivalent, recipe.base.trust_remote_code])

    def build(folder: Path) -> dict[str, Any]:
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        out = folder / recipe.model
        out.mkdir()
        payload = {
            "source": source,
            "equivalent": equivalent,
            "out": str(out),
            "allow_remote_code": recipe.base.trust_remote_code,
            "offline": False,
        }
        made, cost = work(
            "workbench.worker.base.prepare:prepare",
            payload,
            show,
            f"base: {recipe.model}",
            limit_s=recipe.limits.quantize_s,
        )
        if Path(made["path"]) == out:
            made["path"] = recipe.model  # Inside the entry, whatever the cache folder is called later.
        return {**made, "key": key, "source": source, "equivalent": equivalent, "cost": cost}

    folder, record = entry("bases", key, build)
    record["path"] = str(folder / record["path"])
    if not Path(record["path"]).exists():
        shutil.rmtree(folder)
        return prepare(recipe, show)
    record["digest"] = digest([record["digest"], equivalent])
    return record


def base_artifact(base: dict[str, Any]) -> Artifact:
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Artifact(
        variant="base",
        method="base",
        format="safetensors",
        path=base["path"],
        digest=base["digest"],
        disk_bytes=base["weight_bytes"],
        parameters=base["parameters"],
        tensor_types={"*": types.get(base["dtype"], base["dtype"])},
        warnings=list(base.get("warnings", [])),
        provenance={"source": base["source"], "revision": base.get("revision"), "cost": base.get("cost")},
    )
