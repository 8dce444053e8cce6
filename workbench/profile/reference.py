"""The reference: what the base says of every scored token, recorded once before a job is measured."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, interpreter
from workbench.machine.identity import has_cuda, versions
from workbench.machine.work import work
from workbench.quantize.make import Made
from workbench.recipe.load import Recipe
from workbench.records import REFERENCE_VERSION, Evaluation, Job, Row, digest, to_json
from workbench.worker.backends import BACKENDS

REFERENCE_MAKER = "transformers"
"""The backend that scores the base for the reference: the one that computes in float32 on a CPU."""


def reference_key(recipe: Recipe, made: Made, evaluation: Evaluation | None) -> str | None:
    """The digest of all that determines the reference of a recipe's base for an evaluation set; None if there is
    nothing to score, or no transformers to score it with. Knowing it makes nothing."""
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    found = versions(module.PACKAGES, interpreter(REFERENCE_MAKER, sys.executable))
    if evaluation is None or REFERENCE_MAKER not in found:
        return None
    options = _reference_options(recipe)
    how = [options["device"], options["attention"], has_cuda()]
    return digest([made.base["digest"], evaluation.digest, REFERENCE_VERSION, found, how])


def reference(
    recipe: Recipe, made: Made, evaluation: Evaluation | None, key: str | None, show: Show
) -> dict[str, Any] | None:
    """What the base says of every scored token, for the divergence of all others: `path` and `digest`.

    The base is scored once a set by transformers: in float32 on a CPU, in its own dtype on a GPU. Where that
    cannot be done, the reason is told, the answer is None, and jobs measure perplexity without divergence.
    """
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    if key is None or evaluation is None:
        if evaluation is not None:
            show.say(
                f"no divergence: {REFERENCE_MAKER}, which scores the base for it, is not installed here. "
                f"Install it with: {module.INSTALL}"
            )
        return None
    options = _reference_options(recipe)
    job = Job(
        base=recipe.model,
        artifact=made.artifacts["base"][0],
        backend=REFERENCE_MAKER,
        options=options,
        workload=recipe.workload,
        evaluation=evaluation,
        base_digest=made.base["digest"],
    )
    threads = str(options.get("threads") or len(os.sched_getaffinity(0)))
    name = "reference.safetensors"

    def build(folder: Path) -> dict[str, Any]:
        for leftover in folder.iterdir():
            leftover.unlink()
        value, cost = work(
            "workbench.worker.measure.job:refer",
            {"job": to_json(job), "out": str(folder / name)},
            show,
            "reference: base's distributions" + (f" on {evaluation.name}" if made.evaluations else ""),
            python=interpreter(REFERENCE_MAKER, sys.executable),
            limit_s=recipe.limits.profile_s,
            environment={**module.ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        )
        return {**value, "base": made.base["digest"], "evaluation": evaluation.digest, "cost": cost}

    try:
        folder, record = entry("references", key, build)
    except (WorkFailed, UserError) as problem:
        show.say(f"no divergence: scoring the base for it failed: {problem}")
        return None
    return {**record, "path": str(folder / name)}


def _reference_options(recipe: Recipe) -> dict[str, Any]:
    """transformers' options as the recipe has them, but for the dtype, which a variant's comparison is not to
    choose."""
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    options = to_json(module.Options()) | recipe.backend(REFERENCE_MAKER).options | {"dtype": "auto"}
    if recipe.base.trust_remote_code:
        options["trust_remote_code"] = True
    return dict(options)


def reference_keys(recipe: Recipe, made: Made) -> dict[str, str]:
    """The key of each evaluation set's reference, that of the first set under an empty name; empty without any."""
    sets = {"": made.evaluation, **made.evaluations}
    keys = {name: reference_key(recipe, made, each) for name, each in sets.items()}
    return {name: key for name, key in keys.items() if key is not None}


def all_references(recipe: Recipe, made: Made, keys: dict[str, str], show: Show) -> dict[str, Any] | None:
    """The first set's reference, and the others under `further`; None if one of them could not be made."""
    first = reference(recipe, made, made.evaluation, keys.get(""), show)
    further = {}
    for name, each in made.evaluations.items():
        found = reference(recipe, made, each, keys.get(name), show) if first else None
        if found is None:
            return None
        further[name] = found
    return first and {**first, "further": further}


def with_reference(rows: dict[str, Row], base: dict[str, Any] | None) -> dict[str, Row]:
    """Without those compared with another reference than `base`: it was lost, and made anew not bit by bit."""
    if base is None:
        return rows
    digests = {"": base["digest"]} | {name: each["digest"] for name, each in base.get("further", {}).items()}
    kept = {}
    for key, row in rows.items():
        found = {"": row.measurement.quality, **row.measurement.qualities} if row.measurement else {}
        own = {name: quality.get("reference_digest") for name, quality in found.items() if quality}
        if all(each in (None, digests.get(name)) for name, each in own.items()):
            kept[key] = row
    return kept
