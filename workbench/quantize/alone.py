"""A variant that a worker makes by itself, from the base's directory or its GGUF file."""

from __future__ import annotations

from pathlib import Path

from workbench.console import Show
from workbench.disk import need_room, remove
from workbench.errors import WorkFailed
from workbench.machine.work import work
from workbench.quantize.record import (
    artifact_key,
    check,
    checkpoint_bytes,
    found_key,
    provenance_of,
    python_of,
    stored_artifact,
)
from workbench.recipe.choices import placed
from workbench.recipe.load import Recipe
from workbench.records import (
    Artifact,
    CalibrationTokens,
    ImportanceMatrix,
    MadeVariant,
    PreparedBase,
    Prices,
    Variant,
    VariantRequest,
    to_json,
)
from workbench.worker.methods import Making


def make_alone(
    recipe: Recipe,
    base: PreparedBase,
    variant: Variant,
    making: Making,
    show: Show,
    *,
    form: str,
    source: Artifact | None = None,
    looks_at: CalibrationTokens | ImportanceMatrix | Prices | None = None,
    grams: str | None = None,
    title: str = "",
) -> Artifact:
    """The artifact, of format `form`; `source`: the file or directory that it starts from, if not the base's directory,
    `looks_at`: what it takes of the calibration, `grams`: a folder of Gram matrices, `title`: what progress calls it.

    Raises `UserError` and `WorkFailed` for what the worker refuses and what it cannot.
    """
    seen = looks_at.digest if looks_at else None
    # What is a single file holds its model's name.
    more: list[object] = [recipe.model, seen] if making.file_name else [seen] if seen else []
    if making.stage == "carry" and source:
        more.append(source.digest)
    here = placed(variant, recipe.path.parent)
    if making.headers:
        more.append(found_key(here))
    key = artifact_key(base, variant, making, more)

    def build(folder: Path) -> Artifact:
        check(recipe, base, source)
        if not making.headers:
            need_room(folder, source.disk_bytes if source else base.weight_bytes)
        out = folder / f"{recipe.model}-{making.file_name or variant.name}"
        remove(out)
        request = VariantRequest(
            base=base.path,
            out=str(out),
            options=here.options,
            source=source.path if source else None,
            tokens=looks_at.path if isinstance(looks_at, CalibrationTokens) else None,
            imatrix=_matrix(looks_at),
            prices=looks_at.path if isinstance(looks_at, Prices) else None,
            grams=grams,
            whole=base.whole,
            allow_remote_code=recipe.base.trust_remote_code,
        )
        made, cost = work(
            making.function,
            to_json(request) | making.arguments,
            MadeVariant,
            show,
            title or (f"{making.label}: {variant.name}" if making.label else variant.name),
            python=python_of(making),
            limit_s=recipe.limits.quantize_s,
            environment=dict(making.environment),
        )
        if not out.exists():
            raise WorkFailed(f"method {variant.method} wrote nothing")
        for note in made.notes:
            show.say(f"{variant.name}: {note}")
        provenance = provenance_of(recipe, base, variant, making, cost, seen) | made.provenance
        warnings = made.warnings
        if source and source.provenance.get("found"):
            # Whose it is, and how it differs from the base, is true of every form of it.
            provenance |= {"found": source.provenance["found"]}
            warnings = [*source.warnings, *warnings]
        if out.is_dir():
            provenance |= {"seconds": {"total": cost.seconds}, "tensor_errors": made.tensor_errors}
        return Artifact(
            variant=variant.name,
            method=variant.method,
            format=made.format or form,
            path=out.name,
            digest=key,
            disk_bytes=checkpoint_bytes(out) if made.disk_bytes is None else made.disk_bytes,
            parameters=base.parameters,
            tensor_types=made.tensor_types,
            warnings=warnings,
            provenance=provenance,
        )

    return stored_artifact(key, variant, build)


def _matrix(looks_at: CalibrationTokens | ImportanceMatrix | Prices | None) -> str | None:
    """The file of the importance matrix, of what comes with one."""
    if isinstance(looks_at, Prices):
        return looks_at.imatrix
    return looks_at.path if isinstance(looks_at, ImportanceMatrix) else None
