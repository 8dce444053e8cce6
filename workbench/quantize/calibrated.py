"""AWQ and GPTQ variants and the importance matrix: one calibration pass for whatever is missing."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.disk import need_room
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, home, interpreter, lock, stored
from workbench.machine.identity import versions
from workbench.machine.work import work
from workbench.quantize.record import artifact_key, checkpoint_bytes, located, provenance_of, stored_artifact
from workbench.recipe.load import Recipe
from workbench.records import (
    Artifact,
    Calibrated,
    CalibrationRequest,
    CalibrationTokens,
    CheckpointRequest,
    Cost,
    ForeignRequest,
    ImportanceMatrix,
    MadeCheckpoint,
    PreparedBase,
    Variant,
    digest,
)


def run_calibration(
    recipe: Recipe,
    base: PreparedBase,
    tokens: CalibrationTokens | None,
    wanted: list[Variant],
    show: Show,
    failures: dict[str, str],
) -> tuple[ImportanceMatrix | None, dict[str, Artifact]]:
    """AWQ and GPTQ variants and the importance matrix, all from one calibration pass."""
    variants = [v for v in wanted if v.method in ("awq", "gptq") and v.options["engine"] == "workbench"]
    foreign = [v for v in wanted if v.method in ("awq", "gptq") and v.options["engine"] != "workbench"]
    weighted = [v for v in wanted if v.method == "gguf" and v.options.get("imatrix")]
    if not variants and not weighted and not foreign:
        return None, {}
    if tokens is None:
        reason = "it needs calibration tokens, and this recipe makes none"
        failures |= {v.name: reason for v in variants + weighted + foreign}
        return None, {}
    precision = _precision(recipe)
    keys = {v.name: artifact_key(base, v, v.method, [tokens.digest, precision]) for v in variants}
    imatrix_key = digest([base.digest, tokens.digest, "imatrix", precision, 1])
    missing = [v for v in variants if stored("artifacts", keys[v.name], Artifact) is None]
    need_imatrix = bool(weighted) and stored("imatrix", imatrix_key, ImportanceMatrix) is None
    pass_key = digest([base.digest, tokens.digest, sorted(keys[v.name] for v in missing), need_imatrix])
    try:
        if missing or need_imatrix:
            with lock(home() / "locks" / f"pass-{base.digest}-{tokens.digest}"):
                key = imatrix_key if need_imatrix else None
                failures |= _pass(recipe, base, tokens, missing, keys, key, pass_key, show)
    except (WorkFailed, UserError) as problem:
        failed = missing + (weighted if need_imatrix else [])
        failures |= {v.name: str(problem) for v in failed}
        show.say(f"calibration failed: {problem}")
    found = {v.name: made for v in variants if (made := stored("artifacts", keys[v.name], Artifact))}
    found = {name: located(made, name) for name, made in found.items()}
    for variant in foreign:
        try:
            found[variant.name] = _by_gptqmodel(recipe, base, tokens, variant, show)
        except (WorkFailed, UserError) as problem:
            failures[variant.name] = str(problem)
            show.say(f"{variant.name} failed: {problem}")
    imatrix = stored("imatrix", imatrix_key, ImportanceMatrix) if weighted else None
    file = home() / "imatrix" / imatrix_key / f"{recipe.model}.imatrix.gguf"
    return imatrix and replace(imatrix, path=str(file)), found


def _precision(recipe: Recipe) -> str:
    """Of the calibration pass: exact where llama.cpp's quantizer is to get an importance matrix, as its own tool is."""
    chosen = recipe.calibration.precision if recipe.calibration else "auto"
    weighted = any(v.method == "gguf" and v.options.get("imatrix") for v in recipe.variants)
    return "float32" if chosen == "auto" and weighted else chosen


def _pass(
    recipe: Recipe,
    base: PreparedBase,
    tokens: CalibrationTokens,
    missing: list[Variant],
    keys: dict[str, str],
    imatrix_key: str | None,
    pass_key: str,
    show: Show,
) -> dict[str, str]:
    """Run the one pass for what is missing and put each result into the cache; the reasons of what it refused."""
    root = home() / "artifacts"
    # Another run may have made some of it while this one waited for the lock.
    missing = [v for v in missing if stored("artifacts", keys[v.name], Artifact) is None]
    if imatrix_key and stored("imatrix", imatrix_key, ImportanceMatrix):
        imatrix_key = None
    if not missing and not imatrix_key:
        return {}
    outs = {}
    for variant in missing:
        outs[variant.name] = root / f"{keys[variant.name]}.partial" / f"{recipe.model}-{variant.name}"
        outs[variant.name].mkdir(parents=True, exist_ok=True)
    state = home() / "states" / pass_key
    state.mkdir(parents=True, exist_ok=True)
    need_room(state, base.parameters * len(missing))
    imatrix_out = state / f"{recipe.model}.imatrix.gguf" if imatrix_key else None
    request = CalibrationRequest(
        base=base.path,
        tokens=tokens.path,
        tokens_digest=tokens.digest,
        variants=[CheckpointRequest(v.name, v.method, v.options, str(outs[v.name])) for v in missing],
        imatrix_out=str(imatrix_out) if imatrix_out else None,
        state=str(state),
        precision=_precision(recipe),
    )
    names = ", ".join([v.name for v in missing] + (["importance matrix"] if imatrix_key else []))
    made, cost = work(
        "workbench.worker.calibration.run:run",
        request,
        Calibrated,
        show,
        f"calibration pass: {names}",
        limit_s=recipe.limits.quantize_s,
    )
    for name, reason in made.refused.items():
        show.say(f"{name} failed: {reason}")
        shutil.rmtree(outs[name].parent, ignore_errors=True)
    for variant in missing:
        if variant.name in made.refused:
            continue
        key, one = keys[variant.name], made.variants[variant.name]
        artifact = _checkpoint(recipe, base, variant, outs[variant.name], key, tokens, one, made.seconds, cost)
        entry("artifacts", key, Artifact, lambda _folder, artifact=artifact: artifact)  # type: ignore[misc]
    if imatrix_key and imatrix_out:

        def keep(folder: Path) -> ImportanceMatrix:
            shutil.copy2(imatrix_out, folder / imatrix_out.name)
            return ImportanceMatrix(imatrix_key, tokens.digest, cost)

        entry("imatrix", imatrix_key, ImportanceMatrix, keep)
    shutil.rmtree(state, ignore_errors=True)
    return made.refused


def _checkpoint(
    recipe: Recipe,
    base: PreparedBase,
    variant: Variant,
    out: Path,
    key: str,
    tokens: CalibrationTokens,
    made: MadeCheckpoint,
    seconds: dict[str, float],
    cost: Cost,
) -> Artifact:
    """An AWQ or GPTQ directory, from what its worker said of it."""
    provenance = provenance_of(recipe, base, variant, variant.method, cost, tokens.digest)
    return Artifact(
        variant=variant.name,
        method=variant.method,
        format=variant.method,
        path=out.name,
        digest=key,
        disk_bytes=checkpoint_bytes(out),
        parameters=base.parameters,
        tensor_types=made.tensor_types,
        warnings=made.warnings,
        provenance=provenance | {"seconds": seconds, "tensor_errors": made.tensor_errors},
    )


def _by_gptqmodel(
    recipe: Recipe, base: PreparedBase, tokens: CalibrationTokens, variant: Variant, show: Show
) -> Artifact:
    """A variant with `engine: gptqmodel`, in a worker of its own."""
    key = artifact_key(base, variant, variant.method, [tokens.digest, versions(("gptqmodel",))])

    def build(folder: Path) -> Artifact:
        out = folder / f"{recipe.model}-{variant.name}"
        shutil.rmtree(out, ignore_errors=True)
        made, cost = work(
            "workbench.worker.methods.gptqmodel:gptqmodel",
            ForeignRequest(
                base.path, tokens.path, variant.method, variant.options, str(out), recipe.base.trust_remote_code
            ),
            MadeCheckpoint,
            show,
            f"GPTQModel: {variant.name}",
            python=interpreter("gptqmodel", sys.executable),
            limit_s=recipe.limits.quantize_s,
            environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
        )
        return _checkpoint(recipe, base, variant, out, key, tokens, made, {"total": cost.seconds}, cost)

    return stored_artifact(key, variant.name, build)
