"""The program in one screen: recipe -> artifacts -> rows.

`run` is quantize, then profile. Each job of `profile` is one artifact in one engine, in a process of its own; its
row is stored the moment it ends, whether it succeeded, failed or cannot run, and what is already measured on
this machine is not measured again. Before the first job that scores tokens the base's own distributions are
recorded, the reference that every divergence of the recipe is measured from.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from workbench.artifacts import Made, Show, make, reference, reference_key, work
from workbench.errors import UserError, WorkFailed
from workbench.home import home, interpreter, lock, portable, remember
from workbench.machine.identity import has_cuda, machine, program, versions
from workbench.recipe import BackendChoice, Recipe, limits_of
from workbench.records import MEASUREMENT_VERSION, Artifact, Job, Measurement, Row, digest, from_json, to_json
from workbench.report import store
from workbench.worker.backends import BACKENDS


def run(recipe: Recipe, show: Show, results: Path, **choice: Any) -> tuple[Made, list[Row]]:
    """Quantize and profile; the rows of every pair of the recipe, old and new."""
    made = quantize(recipe, show)
    return made, profile(recipe, made, show, results, **choice)


def quantize(recipe: Recipe, show: Show, names: set[str] | None = None) -> Made:
    """Make what the recipe names, or find it made; remembered as this machine's last recipe."""
    for warning in recipe.warnings:
        show.say(f"note: {warning}")
    remember(recipe.path)
    return make(recipe, show, names)


def profile(
    recipe: Recipe, made: Made, show: Show, results: Path, *,
    backends: list[str] | None = None, variants: list[str] | None = None, again: bool = False,
) -> list[Row]:  # fmt: skip
    """Measure every pair of artifact and backend that the recipe asks for; returns their rows in order."""
    here = machine()
    folder = results / here["name"]
    measured = {} if again else _measured(folder)
    pairs, key = list(_pairs(recipe, backends, variants)), reference_key(recipe, made)
    plans = [_plan(recipe, made, choice, name, key) for choice, name in pairs]
    base: dict[str, Any] | None = None
    if any(_scores(row) and row.key not in measured for row in plans):
        base = reference(recipe, made, key, show)
        if base is None:
            # Their rows will be without divergence and must not pass for rows with it.
            bare = [_plan(recipe, made, choice, name, None) for choice, name in pairs]
            plans = [row if row.key in measured else other for row, other in zip(plans, bare, strict=True)]
        measured = _of_reference(measured, base)
    rows = []
    for row in plans:
        if row.key in measured:
            rows.append(measured[row.key])
            continue
        waited: list[str] = []
        with lock(home() / "locks" / f"row-{row.key}", partial(waited.append, row.key)):
            # Another run may have stored it in the meantime; if it was waited for, its failure counts too.
            if not again:
                measured |= _of_reference(_measured(folder, set(waited)), base)
            if row.key in measured:
                rows.append(measured[row.key])
                continue
            if row.error is None and row.unsupported is None:
                row = _measure(recipe, made, row, base, show)
            store.append(results, here["name"], _portable(row))
        rows.append(row)
        if row.error:
            show.say(f"{row.artifact.variant} on {row.backend} failed: {row.error}")
    return rows


def _pairs(
    recipe: Recipe, backends: list[str] | None, variants: list[str] | None
) -> Iterator[tuple[BackendChoice, str]]:
    """Backend by backend, the base first: every delta is against the base on the same backend."""
    choices = [recipe.backend(name) for name in backends] if backends else list(recipe.backends)
    wanted = {"base"} | {recipe.variant(name).name for name in variants} if variants else None
    for choice in choices:
        for variant in recipe.variants:
            named = wanted is not None and variant.name in wanted
            if named or (wanted is None and choice.takes(variant.name)):
                yield choice, variant.name


def _measured(folder: Path, failed: Collection[str] = ()) -> dict[str, Row]:
    """Rows that need not be measured again; failures are tried again but for the keys in `failed`."""
    if not folder.exists():
        return {}
    rows, _ = store.read(folder)
    return {row.key: row for row in rows if row.error is None or row.key in failed}


def _of_reference(rows: dict[str, Row], base: dict[str, Any] | None) -> dict[str, Row]:
    """Without those compared with another reference than `base`: it was lost, and made anew not bit by bit."""
    if base is None:
        return rows
    kept = {}
    for key, row in rows.items():
        quality = row.measurement.quality if row.measurement else None
        if not quality or quality.get("reference_digest") in (None, base["digest"]):
            kept[key] = row
    return kept


def _scores(row: Row) -> bool:
    """Whether the job of a planned row would look at the evaluation."""
    return row.evaluation is not None and row.error is None and row.unsupported is None


def _plan(recipe: Recipe, made: Made, choice: BackendChoice, name: str, reference: str | None) -> Row:
    """The row as far as it is known before anything runs: all but the measurement.

    `reference` is the key of what the divergence is to be measured from, a part of the row's own key.
    """
    module = importlib.import_module(BACKENDS[choice.name])
    error = unsupported = None
    artifacts = made.artifacts.get(name, [])
    if artifacts:
        reasons = [module.unsupported(artifact, has_cuda()) for artifact in artifacts]
        best = reasons.index(None) if None in reasons else 0
        artifact = artifacts[best]
        unsupported = reasons[best] or limits_of(recipe.variant(name)).get(choice.name)
        if unsupported and name in made.failures:
            # The form that this engine reads could have been made, and was not.
            error, unsupported = made.failures[name], None
    else:
        variant = recipe.variant(name)
        artifact = Artifact(
            variant=name, method=variant.method, format="", path="", digest="", disk_bytes=0, parameters=0
        )
        error = made.failures.get(name, "it was not made")
    evaluation = made.evaluation
    options = {**choice.options}
    if recipe.base.trust_remote_code and "trust_remote_code" in options:
        options["trust_remote_code"] = True
    found = versions(module.PACKAGES, interpreter(choice.name, sys.executable))
    causes = [
        recipe.model, name, artifact.digest, choice.name, found, options, recipe.workload,
        evaluation.digest if evaluation else None, MEASUREMENT_VERSION, unsupported,
    ]  # fmt: skip
    row = Row(
        key="", base=recipe.model, recipe=recipe.name, recipe_digest=recipe.digest,
        artifact=artifact, backend=choice.name, workload=recipe.workload, evaluation=evaluation,
        measurement=None, machine=machine(), versions=found | program(), started_at=_now(), duration_s=0.0,
        options=options, error=error, unsupported=unsupported,
    )  # fmt: skip
    return replace(row, key=digest([*causes, reference] if reference and _scores(row) else causes))


def _measure(recipe: Recipe, made: Made, row: Row, base: dict[str, Any] | None, show: Show) -> Row:
    """Run the job in its engine's interpreter and fill the row in."""
    module = importlib.import_module(BACKENDS[row.backend])
    job = Job(
        base=recipe.model, artifact=row.artifact, backend=row.backend, options=row.options,
        workload=row.workload, evaluation=row.evaluation, reference=base["path"] if base else None,
        base_digest=made.base["digest"],
    )  # fmt: skip
    threads = str(row.options.get("threads") or len(os.sched_getaffinity(0)))
    environment = {**module.ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    started_at, started = _now(), time.monotonic()
    duration_s: float | None = None
    measurement, error = None, None
    try:
        value, cost = work(
            "workbench.worker.profile:measure", {"job": to_json(job)}, show, f"{row.backend}: {row.artifact.variant}",
            python=interpreter(row.backend, sys.executable), limit_s=recipe.limits.profile_s,
            environment=environment,
        )  # fmt: skip
        duration_s = cost["seconds"]  # Without the wait for another run to end.
        measurement = from_json(Measurement, value)
        measurement = replace(measurement, memory=measurement.memory | cost["memory"])
    except (WorkFailed, UserError) as problem:
        error = str(problem)
    return replace(
        row, measurement=measurement, error=error, started_at=started_at,
        duration_s=round(time.monotonic() - started, 3) if duration_s is None else duration_s,
    )  # fmt: skip


def _portable(row: Row) -> Row:
    """The row as others may read it: rows are published, and the folders of this machine are nobody's business."""
    plain: Row = from_json(Row, json.loads(portable(json.dumps(to_json(row)))))
    return plain


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
