"""Calibrated variants and the importance matrix: one calibration pass for whatever is missing, and one that goes
backward for variants whose objective is the output."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.disk import need_room
from workbench.errors import UserError, WorkFailed
from workbench.gpus import for_a_job
from workbench.home import WAITING, entry, holder, home, lock, stored, who
from workbench.machine.work import work
from workbench.quantize.record import artifact_key, check, checkpoint_bytes, located, provenance_of
from workbench.recipe.choices import making_of
from workbench.recipe.load import Recipe
from workbench.records import (
    Artifact,
    Calibrated,
    CalibrationRequest,
    CalibrationTokens,
    CheckpointRequest,
    GramMatrices,
    ImportanceMatrix,
    PreparedBase,
    Variant,
    digest,
    to_json,
)
from workbench.worker.methods import Making, method_named

WEIGHTED = ("imatrix", "prices")
"""What needs an importance matrix (`Making.calibration`)."""


def run_calibration(
    recipe: Recipe,
    base: PreparedBase,
    tokens: CalibrationTokens | None,
    wanted: Mapping[str, tuple[Variant, Making]],
    show: Show,
    failures: dict[str, str],
) -> tuple[ImportanceMatrix | None, dict[str, Artifact]]:
    """The importance matrix, and all variants that the pass makes, by name; what fails is added to `failures`."""
    looking = [name for name, (_, making) in wanted.items() if making.calibration]
    weighted = [name for name, (_, making) in wanted.items() if making.calibration in WEIGHTED]
    variants = {name: each for name, each in wanted.items() if each[1].stage == "pass"}
    if tokens is None:
        failures |= dict.fromkeys(looking, "it needs calibration tokens, and this recipe makes none")
        return None, {}
    precision = _precision(recipe)
    keys = {name: artifact_key(base, *each, [tokens.digest, precision]) for name, each in variants.items()}
    imatrix_key = digest([base.digest, tokens.digest, "imatrix", precision, 1])
    missing = [name for name in variants if stored("artifacts", keys[name], Artifact) is None]
    need_imatrix = bool(weighted) and stored("imatrix", imatrix_key, ImportanceMatrix) is None
    compensated = [name for name, (_, making) in wanted.items() if making.grams]
    grams_key = digest([base.digest, tokens.digest, "grams", precision, 1]) if compensated else None
    need_grams = grams_key is not None and stored("grams", grams_key, GramMatrices) is None
    file = home() / "locks" / f"pass-{base.digest}-{tokens.digest}"

    def waiting() -> None:
        show.say(f"{WAITING}, which calibrates the same{holder(file)}")

    def a_pass(function: str, asked: list[str], imatrix: str | None, grams: str | None) -> None:
        """One over the base; what it fails to make is noted."""
        if not asked and not imatrix and not grams:
            return
        asked_for = [sorted(keys[name] for name in asked), bool(imatrix), *(["grams"] if grams else [])]
        key = digest([base.digest, tokens.digest, *asked_for])
        outs = {name: variants[name] for name in asked}
        try:
            with lock(file, waiting, note=who("calibration pass")):
                done = _pass(function, recipe, base, tokens, outs, keys, imatrix, grams, key, show)
                if done:
                    failures.update(done.refused | dict.fromkeys(weighted if done.no_imatrix else [], done.no_imatrix))
        except (WorkFailed, UserError) as problem:
            without = (weighted if imatrix else []) + (compensated if grams else [])
            failures.update(dict.fromkeys(asked + without, str(problem)))
            show.say(f"calibration failed: {problem}")

    backward = [name for name in missing if variants[name][1].gradients]
    forward = [name for name in missing if name not in backward]
    a_pass("run", forward, imatrix_key if need_imatrix else None, grams_key if need_grams else None)
    a_pass("outputs", backward, None, None)
    found = {
        name: located(made, variant)
        for name, (variant, _) in variants.items()
        if (made := stored("artifacts", keys[name], Artifact))
    }
    imatrix = stored("imatrix", imatrix_key, ImportanceMatrix) if weighted else None
    matrix = home() / "imatrix" / imatrix_key / f"{recipe.model}.imatrix.gguf"
    grams = str(home() / "grams" / grams_key) if grams_key else ""
    return imatrix and replace(imatrix, path=str(matrix), grams=grams), found


def _precision(recipe: Recipe) -> str:
    """Of the calibration pass: exact where llama.cpp's quantizer is to get an importance matrix, as its own tool is."""
    chosen = recipe.calibration.precision if recipe.calibration else "auto"
    weighted = any(making_of(variant).calibration in WEIGHTED for variant in recipe.variants)
    return "float32" if chosen == "auto" and weighted else chosen


def pass_devices(recipe: Recipe) -> int | None:
    """Over how many the pass is shared out, where the recipe says."""
    said = recipe.calibration.devices if recipe.calibration else "auto"
    return None if said == "auto" else said


def _pass(
    function: str,
    recipe: Recipe,
    base: PreparedBase,
    tokens: CalibrationTokens,
    missing: Mapping[str, tuple[Variant, Making]],
    keys: dict[str, str],
    imatrix_key: str | None,
    grams_key: str | None,
    pass_key: str,
    show: Show,
) -> Calibrated | None:
    """Run a pass (a module of `worker.calibration`) for what is missing and put each result into the cache; None where
    nothing was."""
    root = home() / "artifacts"
    # Another run may have made some of it while this one waited for the lock.
    missing = {name: each for name, each in missing.items() if stored("artifacts", keys[name], Artifact) is None}
    if imatrix_key and stored("imatrix", imatrix_key, ImportanceMatrix):
        imatrix_key = None
    if grams_key and stored("grams", grams_key, GramMatrices):
        grams_key = None
    if not missing and not imatrix_key and not grams_key:
        return None
    check(recipe, base)
    outs = {}
    for name in missing:
        outs[name] = root / f"{keys[name]}.partial" / f"{recipe.model}-{name}"
        outs[name].mkdir(parents=True, exist_ok=True)
    state = home() / "states" / pass_key
    state.mkdir(parents=True, exist_ok=True)
    need_room(state, base.parameters * len(missing))
    imatrix_out = state / f"{recipe.model}.imatrix.gguf" if imatrix_key else None
    grams_out = state / "grams" if grams_key else None
    request = CalibrationRequest(
        base=base.path,
        tokens=tokens.path,
        tokens_digest=tokens.digest,
        variants=[
            CheckpointRequest(name, variant.method, variant.options, str(outs[name]))
            for name, (variant, _) in missing.items()
        ],
        imatrix_out=str(imatrix_out) if imatrix_out else None,
        state=str(state),
        precision=_precision(recipe),
        grams_out=str(grams_out) if grams_out else None,
        devices=pass_devices(recipe),
    )
    others = {"importance matrix": imatrix_key, "Gram matrices": grams_key}
    names = ", ".join([*missing, *(name for name, key in others.items() if key)])
    made, cost = work(
        f"workbench.worker.calibration.{function}:run",
        request,
        Calibrated,
        show,
        f"calibration pass: {names}",
        limit_s=recipe.limits.quantize_s,
        # Only the forward pass is shared out; its `auto` is all that are visible.
        environment=for_a_job(pass_devices(recipe) if function == "run" else 1),
    )
    for name, reason in made.refused.items():
        show.say(f"{name} failed: {reason}")
        shutil.rmtree(outs[name].parent, ignore_errors=True)
    for name, (variant, making) in missing.items():
        if name in made.refused:
            continue
        one, provenance = made.variants[name], provenance_of(recipe, base, variant, making, cost, tokens.digest)
        artifact = Artifact(
            variant=name,
            method=variant.method,
            format=method_named(variant.method).WRITES[0],
            path=outs[name].name,
            digest=keys[name],
            disk_bytes=checkpoint_bytes(outs[name]),
            parameters=base.parameters,
            tensor_types=one.tensor_types,
            warnings=one.warnings,
            provenance=provenance
            | {
                "seconds": made.seconds,
                "tensor_errors": one.tensor_errors,
                "layers": to_json(made.layers),
                "experts": made.experts,
            }
            | ({"devices": made.devices} if made.devices > 1 else {}),
        )
        entry("artifacts", keys[name], Artifact, lambda _folder, artifact=artifact: artifact)  # type: ignore[misc]
    if imatrix_key and imatrix_out and not made.no_imatrix:

        def keep(folder: Path) -> ImportanceMatrix:
            shutil.copy2(imatrix_out, folder / imatrix_out.name)
            return ImportanceMatrix(imatrix_key, tokens.digest, cost)

        entry("imatrix", imatrix_key, ImportanceMatrix, keep)
    if grams_key and grams_out and not made.no_imatrix:

        def move(folder: Path) -> GramMatrices:
            # Large, and of no further use where they were written.
            for file in grams_out.iterdir():
                file.rename(folder / file.name)
            return GramMatrices(grams_key, tokens.digest, cost)

        entry("grams", grams_key, GramMatrices, move)
    shutil.rmtree(state, ignore_errors=True)
    return made
