"""The jobs of a recipe: which pairs of variant and engine there are, and each one's row before it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from workbench.engines import uses_gpu
from workbench.gpus import for_a_job, too_few
from workbench.home import installation, interpreter
from workbench.machine.identity import machine, program, versions
from workbench.quantize.make import Made
from workbench.recipe.choices import BackendChoice, form_for, limits_of
from workbench.recipe.load import Recipe
from workbench.records import MEASUREMENT_VERSION, Artifact, Row, Workload, digest, to_json
from workbench.worker.backends import backend_named

HARNESS = ("lm-eval",)
"""The package of lm-evaluation-harness."""


def harness_missing(made: Made, backends: Collection[str]) -> dict[str, str]:
    """Backend -> why it cannot run tasks of lm-evaluation-harness, which has to be installed beside it."""
    if not any(task.harness for task in made.tasks.values()):
        return {}
    names = sorted(name for name in backends if not versions(HARNESS, interpreter(name, sys.executable)))
    reason = (
        "tasks of lm-evaluation-harness are left out, it is not installed here. Install it with: pip install lm-eval"
    )
    return dict.fromkeys(names, reason)


def pairs_of(
    recipe: Recipe, backends: list[str] | None, variants: list[str] | None
) -> Iterator[tuple[BackendChoice, str]]:
    """Backend by backend, the base first: every delta is against the base on the same backend.

    A variant that is named runs also where the recipe does not send it; of those that a pattern means, none does.
    """
    choices = [choice for name in backends for choice in recipe.choices(name)] if backends else list(recipe.backends)
    named = {"base", *variants} if variants else set()
    wanted = recipe.matching(variants or ["*"])
    for choice in choices:
        for variant in recipe.variants:
            if variant.name in named or (variant.name in wanted and choice.takes(variant.name)):
                yield choice, variant.name


def already_measured(rows: list[Row], since: str, failed: Collection[tuple[str, str]] | None = None) -> dict[str, Row]:
    """Rows that need not be measured again: those of this installation. Published ones of such hardware are another's.

    Failures are tried again: all of them, or those in `failed` (key and start), which were there before this run.
    """
    # That a pair cannot run needs no saying every night.
    here = installation()
    own = [row for row in rows if row.machine.is_of(here)]
    recent = [row for row in own if row.started_at >= since or row.unsupported]
    settled = [
        row for row in recent if not row.error or (failed is not None and (row.key, row.started_at) not in failed)
    ]
    return {row.key: row for row in settled}


def is_scored(row: Row) -> bool:
    """Whether the job of a planned row would look at the evaluation."""
    return bool(row.evaluations) and row.error is None and row.unsupported is None


def planned_row(recipe: Recipe, made: Made, choice: BackendChoice, name: str, reference: str | None) -> Row:
    """The row as far as it is known before anything runs: all but the measurement.

    `reference` is the key of what the divergence is to be measured from, a part of the row's own key.
    """
    module = backend_named(choice.name)
    error = unsupported = None
    artifacts = made.artifacts.get(name, [])
    if artifacts:
        reasons = [module.unsupported(artifact, uses_gpu(choice.name)) for artifact in artifacts]
        best = reasons.index(None) if None in reasons else 0
        artifact = artifacts[best]
        limit = limits_of(recipe.variant(name)).get(choice.name)
        limit = limit or artifact.provenance.get("limits", {}).get(choice.name)
        unsupported = reasons[best] or limit
        form = form_for(recipe.variant(name), choice.name)
        if reasons[best] and form in module.LOADS and form not in [each.format for each in artifacts]:
            # There could be a form for this engine: why there is none says more than that it does not read the others.
            unsupported = limit or made.refused.get(name) or reasons[best]
        if unsupported is None:
            cuda, devices = uses_gpu(choice.name), devices_of(choice.options)
            unsupported = module.refuses(module.Options(**choice.options), artifact.format, cuda)
            unsupported = unsupported or (too_few(devices) if cuda else None)
        if unsupported and name in made.failures:
            # The form that this engine reads could have been made, and was not.
            error, unsupported = made.failures[name], None
    else:
        variant = recipe.variant(name)
        artifact = Artifact(
            variant=name, method=variant.method, format="", path="", digest="", disk_bytes=0, parameters=0
        )
        error = made.failures.get(name, "it was not made")
    further = {name: test.digest for name, test in made.evaluations.items()}
    first = further.pop(next(iter(further), ""), None)
    options = trusting(recipe, choice.options)
    found = versions(module.PACKAGES, interpreter(choice.name, sys.executable))
    causes: list[object] = [
        recipe.model,
        name,
        artifact.digest,
        choice.name,
        found,
        options,
        _cause(recipe.workload),
        first,
        MEASUREMENT_VERSION,
        unsupported,
    ]
    missing = harness_missing(made, [choice.name]).get(choice.name)
    tasks = {name: task for name, task in made.tasks.items() if not (task.harness and missing)}
    if further or tasks:
        causes.append([further | {name: task.digest for name, task in tasks.items()}])
    if any(task.harness for task in tasks.values()):
        found = found | versions(HARNESS, interpreter(choice.name, sys.executable))
        causes.append(found)
    grid = made.base.quantized_types
    row = Row(
        key="",
        base=recipe.model,
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        artifact=artifact,
        backend=choice.name,
        workload=recipe.workload,
        measurement=None,
        machine=replace(machine(), installation=installation()),
        versions=found | program(),
        started_at=now(),
        duration_s=0.0,
        options=options,
        error=error,
        unsupported=unsupported,
        evaluations=made.evaluations,
        tasks=tasks,
        warnings=([missing] if missing else []) + ([on_its_grid(grid)] if grid else []),
        base_types=grid,
    )
    return replace(row, key=digest([*causes, reference] if reference and is_scored(row) else causes))


def on_its_grid(types: list[str]) -> str:
    """What is to be known of every variant of a base that was stored in these quantized types before."""
    kinds = ", ".join(types)
    return (
        f"the base was de-quantized from {kinds}: its weights lie on that grid, so a variant of these types loses less "
        "here than of the model that the file was made from, and others look worse beside it"
    )


def _cause(workload: Workload) -> dict[str, object]:
    """The workload as it stands in a key. Not as it is stored: what schema 1 measured is not to be measured anew."""
    (prompt_tokens, *more_prompt_tokens), (batch, *more_batch) = workload.prompt_tokens, workload.batches
    old = {"prompt_tokens": prompt_tokens, "more_prompt_tokens": more_prompt_tokens}
    old |= {"batch": batch, "more_batch": more_batch}
    return {name: value for name, value in to_json(workload).items() if name != "batches"} | old


def trusting(recipe: Recipe, options: dict[str, object]) -> dict[str, object]:
    """The options with the base's word on remote code, where the engine has an option for it."""
    said = recipe.base.trust_remote_code and "trust_remote_code" in options
    return {**options, "trust_remote_code": True} if said else options


def all_options(recipe: Recipe, backend: str, given: dict[str, object]) -> dict[str, object]:
    """What a worker is told: the given options, and the defaults of those that are not."""
    return trusting(recipe, to_json(backend_named(backend).Options(**given)))


def devices_of(options: Mapping[str, object]) -> int:
    """Over how many GPUs a backend's options spread a model."""
    return int(str(options.get("tensor_parallel") or 1))


def environment_of(backend: str, options: Mapping[str, object]) -> dict[str, str]:
    """The environment of a backend's worker: one GPU, unless its options ask for several."""
    threads = str(options.get("threads") or len(os.sched_getaffinity(0)))
    own = {**backend_named(backend).ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    return own | for_a_job(devices_of(options))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
