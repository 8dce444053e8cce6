"""AWQ and GPTQ variants and the importance matrix: one calibration pass for whatever is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from workbench.console import Show
from workbench.disk import need_room
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, home, interpreter, lock
from workbench.machine.identity import versions
from workbench.machine.work import work
from workbench.quantize.record import artifact_key, checkpoint_bytes, provenance_of, stored_artifact
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Variant, digest, to_json


def run_calibration(
    recipe: Recipe,
    base: dict[str, Any],
    tokens: dict[str, Any] | None,
    wanted: list[Variant],
    show: Show,
    failures: dict[str, str],
) -> tuple[dict[str, Any] | None, dict[str, Artifact]]:
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
    keys = {v.name: artifact_key(base, v, v.method, [tokens["digest"], precision]) for v in variants}
    imatrix_key = digest([base["digest"], tokens["digest"], "imatrix", precision, 1])
    root = home() / "artifacts"
    missing = [v for v in variants if not (root / keys[v.name] / "artifact.json").exists()]
    imatrix_file = home() / "imatrix" / imatrix_key / f"{recipe.model}.imatrix.gguf"
    need_imatrix = bool(weighted) and not (imatrix_file.parent / "imatrix.json").exists()
    pass_key = digest([base["digest"], tokens["digest"], sorted(keys[v.name] for v in missing), need_imatrix])
    try:
        if missing or need_imatrix:
            with lock(home() / "locks" / f"pass-{base['digest']}-{tokens['digest']}"):
                key = imatrix_key if need_imatrix else None
                failures |= _pass(recipe, base, tokens, missing, keys, key, pass_key, show)
    except (WorkFailed, UserError) as problem:
        failed = missing + (weighted if need_imatrix else [])
        failures |= {v.name: str(problem) for v in failed}
        show.say(f"calibration failed: {problem}")
    found = {}
    for variant in variants:
        if (root / keys[variant.name] / "artifact.json").exists():
            found[variant.name] = stored_artifact(keys[variant.name], variant.name, _unmade)
    for variant in foreign:
        try:
            found[variant.name] = _by_gptqmodel(recipe, base, tokens, variant, show)
        except (WorkFailed, UserError) as problem:
            failures[variant.name] = str(problem)
            show.say(f"{variant.name} failed: {problem}")
    imatrix = None
    if weighted and (imatrix_file.parent / "imatrix.json").exists():
        imatrix = {"path": str(imatrix_file), "digest": imatrix_key}
    return imatrix, found


def _precision(recipe: Recipe) -> str:
    """Of the calibration pass: exact where llama.cpp's quantizer is to get an importance matrix, as its own tool is."""
    chosen = recipe.calibration.precision if recipe.calibration else "auto"
    weighted = any(v.method == "gguf" and v.options.get("imatrix") for v in recipe.variants)
    return "float32" if chosen == "auto" and weighted else chosen


def _pass(
    recipe: Recipe,
    base: dict[str, Any],
    tokens: dict[str, Any],
    missing: list[Variant],
    keys: dict[str, str],
    imatrix_key: str | None,
    pass_key: str,
    show: Show,
) -> dict[str, str]:
    """Run the one pass for what is missing and put each result into the cache; the reasons of what it refused."""
    root = home() / "artifacts"
    # Another run may have made some of it while this one waited for the lock.
    missing = [v for v in missing if not (root / keys[v.name] / "artifact.json").exists()]
    if imatrix_key and (home() / "imatrix" / imatrix_key / "imatrix.json").exists():
        imatrix_key = None
    if not missing and not imatrix_key:
        return {}
    outs = {}
    for variant in missing:
        outs[variant.name] = root / f"{keys[variant.name]}.partial" / f"{recipe.model}-{variant.name}"
        outs[variant.name].mkdir(parents=True, exist_ok=True)
    state = home() / "states" / pass_key
    state.mkdir(parents=True, exist_ok=True)
    need_room(state, base["parameters"] * len(missing))
    imatrix_out = state / f"{recipe.model}.imatrix.gguf" if imatrix_key else None
    payload = {
        "base": base["path"],
        "tokens": tokens["path"],
        "tokens_digest": tokens["digest"],
        "variants": [
            {"name": v.name, "method": v.method, "options": v.options, "out": str(outs[v.name])} for v in missing
        ],
        "imatrix_out": str(imatrix_out) if imatrix_out else None,
        "state": str(state),
        "device": "auto",
        "threads": None,
        "seed": 0,
        "precision": _precision(recipe),
    }
    names = ", ".join([v.name for v in missing] + (["importance matrix"] if imatrix_key else []))
    made, cost = work(
        "workbench.worker.calibration.run:run",
        payload,
        show,
        f"calibration pass: {names}",
        limit_s=recipe.limits.quantize_s,
    )
    refused: dict[str, str] = made["refused"]
    for name, reason in refused.items():
        show.say(f"{name} failed: {reason}")
        shutil.rmtree(outs[name].parent, ignore_errors=True)
    for variant in missing:
        if variant.name in refused:
            continue
        record = _checkpoint(recipe, base, variant, outs[variant.name], keys[variant.name], tokens, made, cost)
        entry("artifacts", keys[variant.name], lambda folder, record=record: record)  # type: ignore[misc]
    if imatrix_key and imatrix_out:

        def keep(folder: Path) -> dict[str, Any]:
            shutil.copy2(imatrix_out, folder / imatrix_out.name)
            return {"digest": imatrix_key, "calibration": tokens["digest"], "cost": cost}

        entry("imatrix", imatrix_key, keep)
    shutil.rmtree(state, ignore_errors=True)
    return refused


def _checkpoint(
    recipe: Recipe,
    base: dict[str, Any],
    variant: Variant,
    out: Path,
    key: str,
    tokens: dict[str, Any],
    made: dict[str, Any],
    cost: dict[str, Any],
) -> dict[str, Any]:
    """The record of an AWQ or GPTQ directory, from what its worker said of it."""
    answer = made["variants"][variant.name]
    record = Artifact(
        variant=variant.name,
        method=variant.method,
        format=variant.method,
        path=out.name,
        digest=key,
        disk_bytes=checkpoint_bytes(out),
        parameters=base["parameters"],
        tensor_types=answer["tensor_types"],
        warnings=answer["warnings"],
        provenance=provenance_of(recipe, base, variant, variant.method, cost, tokens["digest"])
        | {"seconds": made["seconds"], "tensor_errors": answer["tensor_errors"]},
    )
    return dict(to_json(record))


def _by_gptqmodel(
    recipe: Recipe, base: dict[str, Any], tokens: dict[str, Any], variant: Variant, show: Show
) -> Artifact:
    """A variant with `engine: gptqmodel`, in a worker of its own."""
    key = artifact_key(base, variant, variant.method, [tokens["digest"], versions(("gptqmodel",))])

    def build(folder: Path) -> dict[str, Any]:
        out = folder / f"{recipe.model}-{variant.name}"
        shutil.rmtree(out, ignore_errors=True)
        payload = {
            "base": base["path"],
            "tokens": tokens["path"],
            "method": variant.method,
            "options": variant.options,
            "out": str(out),
            "allow_remote_code": recipe.base.trust_remote_code,
        }
        answer, cost = work(
            "workbench.worker.methods.gptqmodel:gptqmodel",
            payload,
            show,
            f"GPTQModel: {variant.name}",
            python=interpreter("gptqmodel", sys.executable),
            limit_s=recipe.limits.quantize_s,
            environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
        )
        made = {"variants": {variant.name: answer}, "seconds": {"total": cost["seconds"]}}
        return _checkpoint(recipe, base, variant, out, key, tokens, made, cost)

    return stored_artifact(key, variant.name, build)


def _unmade(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{folder} was there a moment ago")
