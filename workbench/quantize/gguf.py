"""GGUF artifacts: the base's one conversion, and every type quantized from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.console import Show
from workbench.disk import need_room
from workbench.home import interpreter
from workbench.machine.identity import has_cuda, versions
from workbench.machine.work import work
from workbench.quantize.record import DTYPE_TYPES, artifact_key, provenance_of, stored_artifact
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Variant, to_json
from workbench.worker.methods import method_named


def convert_base(recipe: Recipe, base: dict[str, Any], show: Show) -> Artifact:
    """The base as one lossless GGUF, from which every type is quantized."""
    kind = DTYPE_TYPES[base["dtype"]]

    def run(out: Path) -> tuple[Any, dict[str, Any]]:
        payload = {"base": base["path"], "out": str(out), "dtype": base["dtype"], "name": recipe.model}
        return work(
            "workbench.worker.methods.gguf:convert",
            payload,
            show,
            f"GGUF conversion ({kind})",
            limit_s=recipe.limits.quantize_s,
        )

    return _gguf(recipe, base, Variant("base", "base", {"type": kind}), None, run, base["weight_bytes"])


def sixteen_bit(recipe: Recipe, base: dict[str, Any], source: Artifact, show: Show) -> Artifact:
    """llama.cpp's base: the conversion itself, or its BF16 form if the base has 32 bits."""
    if base["dtype"] != "float32":
        return source
    variant = Variant("base", "base", {"type": "BF16"})
    return quantize_gguf(recipe, base, source, variant, None, show)


def quantize_gguf(
    recipe: Recipe, base: dict[str, Any], source: Artifact, variant: Variant, imatrix: dict[str, Any] | None, show: Show
) -> Artifact:
    weighted = imatrix if variant.options.get("imatrix") else None
    kind = variant.options["type"]
    encoder = _encoder(variant)

    def run(out: Path) -> tuple[Any, dict[str, Any]]:
        payload = {
            "source": source.path,
            "out": str(out),
            "type": kind,
            "imatrix": weighted["path"] if weighted else None,
            "threads": None,
            "encoder": encoder,
        }
        made, cost = work(
            "workbench.worker.methods.gguf:quantize",
            payload,
            show,
            variant.name if variant.method == "gguf" else f"GGUF {kind}",
            python=interpreter("llamacpp", sys.executable),
            limit_s=recipe.limits.quantize_s,
        )
        for note in made["notes"]:
            show.say(f"{variant.name}: {note}")
        return made, cost

    return _gguf(recipe, base, variant, weighted, run, source.disk_bytes)


def _gguf(
    recipe: Recipe, base: dict[str, Any], variant: Variant, imatrix: dict[str, Any] | None, run: Any, at_most_bytes: int
) -> Artifact:
    kind = variant.options["type"]
    suffix = "-imatrix" if imatrix else ""
    name = f"{recipe.model}{suffix}-{kind}.gguf"
    calibration = imatrix["digest"] if imatrix else None
    encoder = _encoder(variant)
    # llama.cpp's own files keep their key whatever the option is called; the encoders' bytes are equal on a CPU, which
    # is where that is tested, and are not passed off as llama.cpp's.
    causes = replace(variant, options={k: v for k, v in variant.options.items() if k != "encoder"})
    more = [recipe.model, calibration]
    if encoder != "llamacpp":
        more += [encoder, versions(("torch",), interpreter("llamacpp", sys.executable))]
    key = artifact_key(base, causes, "gguf", more)

    def build(folder: Path) -> dict[str, Any]:
        need_room(folder, at_most_bytes)
        partial = folder / name
        partial.unlink(missing_ok=True)
        made, cost = run(partial)
        artifact = Artifact(
            variant=variant.name,
            method=variant.method,
            format="gguf",
            path=name,
            digest=key,
            disk_bytes=made["disk_bytes"],
            parameters=base["parameters"],
            tensor_types=made["tensor_types"],
            warnings=made["warnings"],
            provenance=provenance_of(recipe, base, variant, "gguf", cost, calibration) | made.get("provenance", {}),
        )
        return dict(to_json(artifact))

    return stored_artifact(key, variant.name, build)


def _encoder(variant: Variant) -> str:
    """Who is asked to make a GGUF's blocks: `llamacpp`, `workbench`, or `auto` where the worker has a choice."""
    method = method_named("gguf")
    return str(method.making(method.Options(**variant.options), has_cuda()).arguments["encoder"])
