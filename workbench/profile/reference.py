"""The reference: what the base says of every scored token, recorded once before a job is measured."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.disk import remove
from workbench.engines import uses_gpu
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, interpreter
from workbench.machine.identity import versions
from workbench.machine.work import work
from workbench.profile.jobs import all_options, environment_of
from workbench.quantize.make import Made
from workbench.quantize.record import check
from workbench.recipe.load import Recipe
from workbench.records import REFERENCE_VERSION, Job, Reference, ReferRequest, Row, digest
from workbench.worker.backends import BACKENDS, backend_named

REFERENCE_MAKER = next(name for name in BACKENDS if backend_named(name).MAKES_REFERENCE)
"""The backend that scores the base for the reference: the first that computes in float32 on a CPU."""


def reference_keys(recipe: Recipe, made: Made) -> dict[str, str]:
    """For each evaluation set the digest of all that determines the base's reference for it; empty where there is no
    engine to score it with. Knowing it makes nothing."""
    module = backend_named(REFERENCE_MAKER)
    found = versions(module.PACKAGES, interpreter(REFERENCE_MAKER, sys.executable))
    if module.PACKAGES[0] not in found:
        return {}
    options = _reference_options(recipe)
    how = [options["device"], options["attention"], uses_gpu(REFERENCE_MAKER)]
    return {
        name: digest([made.base.digest, test.digest, REFERENCE_VERSION, found, how])
        for name, test in made.evaluations.items()
    }


def reference_key(keys: dict[str, str]) -> str | None:
    """One key for those of all sets, as rows are made of it."""
    return digest([*keys.values()]) if len(keys) > 1 else next(iter(keys.values()), None)


def all_references(recipe: Recipe, made: Made, keys: dict[str, str], show: Show) -> dict[str, Reference] | None:
    """Each evaluation set's reference, for the divergence of all others.

    The base is scored once a set by one engine: in float32 on a CPU, in its own dtype on a GPU. Where that
    cannot be done for all sets, the reason is told, the answer is None, and jobs measure perplexity without divergence.
    """
    if not keys:
        module = backend_named(REFERENCE_MAKER)
        show.say(
            f"no divergence: {REFERENCE_MAKER}, which scores the base for it, is not installed here. "
            f"Install it with: {module.INSTALL}"
        )
        return None
    try:
        return {name: _reference(recipe, made, name, key, show) for name, key in keys.items()}
    except (WorkFailed, UserError) as problem:
        show.say(f"no divergence: scoring the base for it failed: {problem}")
        return None


def _reference(recipe: Recipe, made: Made, evaluation: str, key: str, show: Show) -> Reference:
    options = _reference_options(recipe)
    job = Job(
        base=recipe.model,
        artifact=made.artifacts["base"][0],
        backend=REFERENCE_MAKER,
        options=options,
        workload=recipe.workload,
        evaluations={evaluation: made.evaluations[evaluation]},
        base_digest=made.base.digest,
    )
    name = "reference.safetensors"

    def build(folder: Path) -> Reference:
        check(recipe, made.base)
        for leftover in folder.iterdir():
            remove(leftover)
        found, cost = work(
            "workbench.worker.measure.job:refer",
            ReferRequest(job, str(folder / name)),
            Reference,
            show,
            "reference: base's distributions" + (f" on {evaluation}" if len(made.evaluations) > 1 else ""),
            python=interpreter(REFERENCE_MAKER, sys.executable),
            limit_s=recipe.limits.profile_s,
            environment=environment_of(REFERENCE_MAKER, options),
        )
        return replace(found, base=made.base.digest, evaluation=made.evaluations[evaluation].digest, cost=cost)

    folder, found = entry("references", key, Reference, build)
    return replace(found, path=str(folder / name))


def _reference_options(recipe: Recipe) -> dict[str, object]:
    """The maker's options as the recipe has them, but for the dtype, which a variant's comparison is not to choose."""
    return all_options(recipe, REFERENCE_MAKER, recipe.backend(REFERENCE_MAKER).options) | {"dtype": "auto"}


def with_reference(rows: dict[str, Row], references: dict[str, Reference] | None) -> dict[str, Row]:
    """Without those compared with another reference than these: theirs was lost, and made anew not bit by bit."""
    if references is None:
        return rows
    return {key: row for key, row in rows.items() if _compared_with(row, references)}


def _compared_with(row: Row, references: dict[str, Reference]) -> bool:
    """Whether a row was compared with these references, or with none."""
    # Another recipe, whose row it may be, can call the first set by another name.
    names = dict(zip(row.evaluations, [*references][:1], strict=False))
    for name, quality in (row.measurement.qualities if row.measurement else {}).items():
        own, wanted = quality.get("reference_digest"), references.get(names.get(name, name))
        if own is not None and own != (wanted.digest if wanted else None):
            return False
    return True
