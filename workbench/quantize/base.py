"""The base as a Hugging Face directory of the program's own, checked, rewritten where the recipe asks for it."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.disk import remove
from workbench.errors import install_with
from workbench.home import entry, home
from workbench.intact import Changed, change, contents
from workbench.machine.work import work
from workbench.quantize.alone import make_alone
from workbench.quantize.record import artifact_key, base_key, provenance_of, versions_of
from workbench.recipe.load import Recipe
from workbench.records import Artifact, BaseRequest, PreparedBase, Variant, digest, to_json
from workbench.shape import DTYPE_CODES
from workbench.worker.methods import BASE, Making
from workbench.worker.methods import base as forms


def prepare(recipe: Recipe, show: Show) -> PreparedBase:
    """The base, downloaded, de-quantized, rewritten, or just found."""
    source = recipe.base.source(recipe.path.parent)
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None

    def build(folder: Path) -> PreparedBase:
        for leftover in folder.iterdir():
            remove(leftover)
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
        for name in sorted(_changed(source)):
            show.say(f"note: {name} is not what it was: this is another base, and what is made of it is made anew")
        # Inside the entry, whatever the cache folder is called later.
        path = recipe.model if Path(made.path) == out else made.path
        return replace(made, path=path, source=source, cost=cost)

    folder, base = entry("bases", base_key(recipe), PreparedBase, build)
    return replace(base, path=str(folder / base.path), digest=digest([base.digest, equivalent]))


def _changed(source: object) -> set[str]:
    """Files of a source that are not what they were when it was last prepared, where it is used in place."""
    found = set[str]()
    for file in sorted((home() / "bases").glob("*/base.json"), key=lambda file: file.lstat().st_mtime_ns):
        with contextlib.suppress(Changed):
            told, prints = contents(file)
            if told.get("source") == source:
                found = {name for name, was in (prints or {}).items() if change(file.parent / name, was)[0]}
    return found


def as_gguf(recipe: Recipe, base: PreparedBase, show: Show) -> tuple[Artifact, Artifact]:
    """The base as one lossless GGUF file, from which others are made; and as engines get it that read nothing else: the
    same, or of 16 bits where the base has 32."""

    def made(making: Making, title: str, source: Artifact | None = None) -> Artifact:
        variant = Variant(BASE, "gguf", {"type": making.file_name.removesuffix(".gguf")})
        artifact = make_alone(recipe, base, variant, making, show, form="gguf", source=source, title=title)
        return replace(artifact, method=BASE)

    whole = forms.conversion(base.dtype, recipe.model)
    source = made(whole, f"GGUF conversion ({DTYPE_CODES[base.dtype]})")
    if base.dtype != "float32":
        return source, source
    half = forms.sixteen_bit(base.dtype)
    return source, made(half, f"GGUF {half.arguments['type']}", source)


def as_loaded(recipe: Recipe, base: PreparedBase, variant: Variant, making: Making, form: str) -> Artifact:
    """What an engine quantizes while it loads the base: the base's own files, under the variant's name and format.
    Raises `UserError` where the package is missing that does it."""
    found = versions_of(making)
    for package in making.packages:
        if package not in found:
            raise install_with(
                f"{package}, which quantizes while {making.python} loads the base,", f"pip install {package}"
            )
    provenance = provenance_of(recipe, base, variant, making, None, None) | {"loaded": True}
    key = artifact_key(base, variant, making, [])
    named = replace(base_artifact(base), variant=variant.name, method=variant.method, format=form)
    return replace(named, digest=key, provenance=provenance)


def base_artifact(base: PreparedBase) -> Artifact:
    return Artifact(
        variant=BASE,
        method=BASE,
        format="safetensors",
        path=base.path,
        digest=base.digest,
        disk_bytes=base.weight_bytes,
        parameters=base.parameters,
        tensor_types={"*": DTYPE_CODES.get(base.dtype, base.dtype)},
        warnings=base.warnings,
        provenance={"source": base.source, "revision": base.revision, "cost": to_json(base.cost)},
    )
