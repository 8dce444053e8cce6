"""The program in one screen: recipe -> artifacts -> rows.

`run` is quantize, then profile. Each job of `profile` is one artifact in one engine, in a process of its own. Jobs
take turns (`Together`), one at work at a time. A row is stored the moment its job ends, whether it succeeded, failed
or cannot run, and what is already measured on this machine is not measured again. Before the first job that scores
tokens the base's own distributions are recorded, the reference that every divergence of the recipe is measured from.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from workbench.artifacts import REFERENCE_MAKER, Made, Show, make, reference, reference_key, turns, work
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, home, interpreter, lock, portable, remember
from workbench.machine import monitor
from workbench.machine.identity import has_cuda, machine, program, versions
from workbench.plan import advice
from workbench.recipe import BackendChoice, Recipe, limits_of
from workbench.records import MEASUREMENT_VERSION, Artifact, Job, Measurement, Row, digest, from_json, to_json
from workbench.report import store
from workbench.worker.backends import BACKENDS

TURNS = 5
"""In how many turns a job's repeats are timed, at the most."""

APART_S = 60.0
"""Seconds between two turns of a job: longer than a slow spell of a shared machine lasts."""

Turns = Generator[None, None, Row]
"""A job: yields where it waits for its next turn, returns its row."""

ENGINE_BYTES = 2 << 30
"""What an engine takes beside the weights, at the most, before another is loaded beside it."""

HARNESS = ("lm-eval",)
"""The package of lm-evaluation-harness."""

OUT_OF_MEMORY = re.compile(
    r"out of memory|memoryerror|cannot allocate|could not make a context|n_seq_max|enough memory|no available memory",
    re.IGNORECASE,
)
"""Engines' words for a workload that does not fit."""


def run(recipe: Recipe, show: Show, results: Path | str, **choice: Any) -> tuple[Made, list[Row]]:
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
    recipe: Recipe, made: Made, show: Show, results: Path | str, *,
    backends: list[str] | None = None, variants: list[str] | None = None, again: bool = False,
    since: str = "", only: Collection[tuple[str, str]] | None = None,
) -> list[Row]:  # fmt: skip
    """Measure every pair of artifact and backend that the recipe asks for; returns their rows in order.

    What was measured at `since` (RFC 3339, UTC) or later is not measured again, nor anything ever measured if it
    is empty; with `again`, everything is. `only`: these (backend, variant) and no others, not even the base.
    """
    here = machine()
    folder = store.under(results, here["name"])
    before = [] if again else store.read(folder)[0]
    measured, failed = _measured(before, since), {(row.key, row.started_at) for row in before if row.error}
    pairs, keys = list(_pairs(recipe, backends, variants)), _reference_keys(recipe, made)
    key = digest([*keys.values()]) if len(keys) > 1 else keys.get("")
    for name, reason in _left_out(made, {choice.name for choice, _ in pairs}).items():
        show.say(f"note: {reason} ({name})")
    plans = [_plan(recipe, made, choice, name, key) for choice, name in pairs]
    base: dict[str, Any] | None = None
    if any(_scores(row) and row.key not in measured for row in plans):
        base = _references(recipe, made, keys, show)
        if base is None:
            # Their rows will be without divergence and must not pass for rows with it.
            bare = [_plan(recipe, made, choice, name, None) for choice, name in pairs]
            plans = [row if row.key in measured else other for row, other in zip(plans, bare, strict=True)]
        measured = _of_reference(measured, base)
    rows: dict[int, Row] = {}
    order = [place for place, (choice, name) in enumerate(pairs) if only is None or (choice.name, name) in only]
    # A machine that drifts (heat, other work) must not make the later variants look slower; the same order each time.
    random.Random(f"{recipe.name} {recipe.workload.seed}").shuffle(order)

    def store_row(row: Row) -> None:
        store.append(results, here["name"], _portable(row))
        rows[row.place] = row
        if row.error:
            show.say(f"{row.artifact.variant} on {row.backend} failed: {row.error}")

    waited = False
    with Together(store_row) as jobs:

        def wait() -> None:
            nonlocal waited
            waited = True
            # Whoever has the lock may be waiting for one of these.
            jobs.finish()

        for place in order:
            row = replace(plans[place], place=place)
            if row.key in measured:
                rows[place] = measured[row.key]
                continue
            waited = False
            with contextlib.ExitStack() as locks:
                locks.enter_context(lock(home() / "locks" / f"row-{row.key}", wait))
                # Another run may have stored it in the meantime; then its failure counts too.
                # To read a bucket again for each row would take longer than the rows: there only if it was waited for.
                if not again and (waited or isinstance(folder, Path)):
                    measured |= _of_reference(_measured(store.read(folder)[0], since, failed), base)
                if row.key in measured:
                    rows[place] = measured[row.key]
                elif row.error or row.unsupported:
                    store_row(row)
                else:
                    if not _room_beside(row):
                        jobs.finish()
                    jobs.start(_measure(recipe, made, row, base, show), locks.pop_all())
        jobs.finish()
    return [rows[place] for place in sorted(rows)]


class Together:
    """Jobs measured in turns, one at work at a time: while one waits for its next turn, the others have theirs.

    A turn is due `APART_S` after the one before. So repeats of one job lie that far apart at the least, except at the
    end, when nobody is left to come between. Leaving ends whatever has not come to its end.
    """

    def __init__(self, ended: Callable[[Row], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._ended, self._clock = ended, clock
        self._waiting: list[tuple[float, Turns, contextlib.ExitStack]] = []
        """Since when, what, and the locks it holds; the longest first."""

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        for _since, job, locks in self._waiting:
            job.close()
            locks.close()

    def start(self, job: Turns, locks: contextlib.ExitStack) -> None:
        """The first turn of a job, then every turn that is due. `locks` are held until its row is stored."""
        self._turn(job, locks)
        while self._waiting and self._clock() - self._waiting[0][0] >= APART_S:
            self._next()

    def finish(self) -> None:
        """The rest of every job, still in turns."""
        while self._waiting:
            self._next()

    def _next(self) -> None:
        _since, job, locks = self._waiting.pop(0)
        self._turn(job, locks)

    def _turn(self, job: Turns, locks: contextlib.ExitStack) -> None:
        with contextlib.ExitStack() as held:
            held.push(locks)
            try:
                next(job)
            except StopIteration as end:
                self._ended(end.value)
            else:
                self._waiting.append((self._clock(), job, held.pop_all()))


def _room_beside(row: Row) -> bool:
    """Whether a job may be loaded while others wait: not on a GPU, whose memory engines take as a whole, and only if
    the machine has room for its weights in float32 and its engine."""
    return not has_cuda() and psutil.virtual_memory().available > 4 * row.artifact.parameters + ENGINE_BYTES


def _reference_keys(recipe: Recipe, made: Made) -> dict[str, str]:
    """The key of each evaluation set's reference, that of the first set under an empty name; empty without any."""
    sets = {"": made.evaluation, **made.evaluations}
    keys = {name: reference_key(recipe, made, each) for name, each in sets.items()}
    return {name: key for name, key in keys.items() if key is not None}


def _references(recipe: Recipe, made: Made, keys: dict[str, str], show: Show) -> dict[str, Any] | None:
    """The first set's reference, and the others under `further`; None if one of them could not be made."""
    first = reference(recipe, made, made.evaluation, keys.get(""), show)
    further = {}
    for name, each in made.evaluations.items():
        found = reference(recipe, made, each, keys.get(name), show) if first else None
        if found is None:
            return None
        further[name] = found
    return first and {**first, "further": further}


def _left_out(made: Made, backends: Collection[str]) -> dict[str, str]:
    """Backend -> why it cannot run tasks of lm-evaluation-harness, which has to be installed beside it."""
    if not any(task.harness for task in made.tasks.values()):
        return {}
    names = sorted(name for name in backends if not versions(HARNESS, interpreter(name, sys.executable)))
    reason = (
        "tasks of lm-evaluation-harness are left out, it is not installed here. Install it with: pip install lm-eval"
    )
    return dict.fromkeys(names, reason)


def _pairs(
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


def _measured(rows: list[Row], since: str, failed: Collection[tuple[str, str]] | None = None) -> dict[str, Row]:
    """Rows that need not be measured again.

    Failures are tried again: all of them, or those in `failed` (key and start), which were there before this run.
    """
    # That a pair cannot run needs no saying every night.
    recent = [row for row in rows if row.started_at >= since or row.unsupported]
    settled = [
        row for row in recent if not row.error or (failed is not None and (row.key, row.started_at) not in failed)
    ]
    return {row.key: row for row in settled}


def _of_reference(rows: dict[str, Row], base: dict[str, Any] | None) -> dict[str, Row]:
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
        if unsupported is None and hasattr(module, "refuses"):
            unsupported = module.refuses(choice.options, has_cuda())
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
    missing = _left_out(made, [choice.name]).get(choice.name)
    tasks = {name: task for name, task in made.tasks.items() if not (task.harness and missing)}
    if made.evaluations or tasks:
        causes.append([{name: each.digest for name, each in (made.evaluations | tasks).items()}])
    if any(task.harness for task in tasks.values()):
        found = found | versions(HARNESS, interpreter(choice.name, sys.executable))
        causes.append(found)
    row = Row(
        key="", base=recipe.model, recipe=recipe.name, recipe_digest=recipe.digest,
        artifact=artifact, backend=choice.name, workload=recipe.workload, evaluation=evaluation,
        measurement=None, machine=machine(), versions=found | program(), started_at=_now(), duration_s=0.0,
        options=options, error=error, unsupported=unsupported,
        evaluations=made.evaluations, tasks=tasks, warnings=[missing] if missing else [],
    )  # fmt: skip
    return replace(row, key=digest([*causes, reference] if reference and _scores(row) else causes))


def _measure(recipe: Recipe, made: Made, row: Row, base: dict[str, Any] | None, show: Show) -> Turns:
    """Run the job in its engine's interpreter and fill the row in; yields between its turns."""
    module = importlib.import_module(BACKENDS[row.backend])
    job = Job(
        base=recipe.model, artifact=row.artifact, backend=row.backend, options=row.options,
        workload=row.workload, evaluation=row.evaluation, reference=base["path"] if base else None,
        base_digest=made.base["digest"], evaluations=row.evaluations, tasks=row.tasks,
        references={name: each["path"] for name, each in base["further"].items()} if base else {},
        turns=1 if has_cuda() else TURNS,
    )  # fmt: skip
    threads = str(row.options.get("threads") or len(os.sched_getaffinity(0)))
    environment = {**module.ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    started_at, started = _now(), time.monotonic()
    duration_s: float | None = None
    measurement, error, doubts = None, None, list[str]()
    here = row.machine | {"copy_bytes_per_s": _copy_bandwidth(show)}
    try:
        value, cost = yield from turns(
            "workbench.worker.profile:measure", {"job": to_json(job)}, show, f"{row.backend}: {row.artifact.variant}",
            python=interpreter(row.backend, sys.executable), limit_s=recipe.limits.profile_s,
            environment=environment,
        )  # fmt: skip
        duration_s = cost["seconds"]  # Without the wait for another run to end.
        measurement = from_json(Measurement, value)
        conditions = measurement.conditions | cost["conditions"]
        doubts = monitor.warnings(conditions)
        measurement = replace(measurement, memory=measurement.memory | cost["memory"], conditions=conditions)
    except (WorkFailed, UserError) as problem:
        error = str(problem)
        if OUT_OF_MEMORY.search(error):
            error += advice(recipe, BackendChoice(row.backend, row.options), row.artifact.variant)
    return replace(
        row, measurement=measurement, error=error, started_at=started_at, machine=here,
        warnings=[*row.warnings, *doubts],
        duration_s=round(time.monotonic() - started, 3) if duration_s is None else duration_s,
    )  # fmt: skip


def _portable(row: Row) -> Row:
    """The row as others may read it: rows are published, and the folders of this machine are nobody's business."""
    plain: Row = from_json(Row, json.loads(portable(json.dumps(to_json(row)))))
    return plain


def _copy_bandwidth(show: Show) -> float | None:
    """Bytes a second that this machine copies, measured once; None where it cannot be."""
    here, device = machine(), "cuda" if has_cuda() else "cpu"
    facts = [here["cpu"], here["threads"], here["memory_bytes"], here["gpus"], here["driver"], device]

    def build(folder: Path) -> dict[str, Any]:
        python = interpreter(REFERENCE_MAKER, sys.executable) if device == "cuda" else sys.executable
        value, _ = work(
            "workbench.worker.timing:copy_bandwidth", {"threads": here["threads"], "device": device}, show,
            "copy bandwidth", python=python, limit_s=300,
        )  # fmt: skip
        return dict(value)

    try:
        return float(entry("bandwidth", digest(facts), build)[1]["bytes_per_s"])
    except (WorkFailed, UserError) as problem:
        show.say(f"no fraction of the memory's bandwidth: copying could not be measured: {problem}")
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
