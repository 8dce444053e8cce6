"""One job: run in its engine's interpreter, its row filled in."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.engines import uses_gpu
from workbench.errors import UserError, WorkFailed, out_of_memory
from workbench.gpus import for_a_job
from workbench.home import entry, interpreter, portable
from workbench.machine import isolate, monitor
from workbench.machine.identity import machine
from workbench.machine.work import in_rounds, work
from workbench.plan.make import advice
from workbench.profile.jobs import all_options, environment_of, now
from workbench.profile.reference import REFERENCE_MAKER
from workbench.profile.rounds import ROUNDS, Rounds
from workbench.quantize.make import Made
from workbench.quantize.record import check
from workbench.recipe.choices import BackendChoice
from workbench.recipe.load import Recipe
from workbench.records import (
    Bandwidth,
    BandwidthRequest,
    Job,
    Measurement,
    Reference,
    Row,
    digest,
    from_json,
    to_json,
)


def run_job(
    recipe: Recipe, made: Made, row: Row, references: dict[str, Reference] | None, engine: str, show: Show
) -> Rounds:
    """Run the job in its engine's interpreter and fill the row in; yields between its rounds. `engine`: its name, and
    what tells it from others of the run."""
    job = Job(
        base=recipe.model,
        artifact=row.artifact,
        backend=row.backend,
        options=all_options(recipe, row.backend, row.options),
        workload=row.workload,
        evaluations=row.evaluations,
        references={name: each.path for name, each in (references or {}).items()},
        base_digest=made.base.digest,
        tasks=row.tasks,
        sliding_window=made.base.sliding_window,
        rounds=1 if uses_gpu(row.backend) else ROUNDS,
    )
    started_at, started = now(), time.monotonic()
    duration_s: float | None = None
    measurement: Measurement | None = None
    error: str | None = None
    doubts: list[str] = []
    here = replace(row.machine, copy_bytes_per_s=_copy_bandwidth(show))
    environment = environment_of(row.backend, row.options)
    try:
        check(recipe, made.base, row.artifact)
        measurement, cost = yield from in_rounds(
            "workbench.worker.measure.job:measure",
            job,
            Measurement,
            show,
            f"{engine}: {row.artifact.variant}",
            python=interpreter(row.backend, sys.executable),
            limit_s=recipe.limits.profile_s,
            environment=environment,
        )
        duration_s = cost.seconds  # Without the wait for another run to end.
        conditions = measurement.conditions | cost.conditions | {"environment": isolate.engines_own(environment)}
        conditions.pop("repeats_s", None)
        if measurement.device == "cpu":
            conditions.pop("gpu_untold", None)  # It lacks nothing of a GPU.
        doubts = monitor.warnings(conditions)
        measurement = replace(measurement, memory=measurement.memory | cost.memory, conditions=conditions)
    except (WorkFailed, UserError) as problem:
        error = str(problem)
        if out_of_memory(problem):
            error += advice(recipe, BackendChoice(row.backend, row.options), row.artifact.variant)
    return replace(
        row,
        measurement=measurement,
        error=error,
        started_at=started_at,
        machine=here,
        warnings=[*row.warnings, *doubts],
        duration_s=round(time.monotonic() - started, 3) if duration_s is None else duration_s,
    )


def portable_row(row: Row) -> Row:
    """The row as others may read it: rows are published, and the folders of this machine are nobody's business."""
    plain: Row = from_json(Row, portable(to_json(row)))
    return plain


def _copy_bandwidth(show: Show) -> float | None:
    """Bytes a second that this machine copies, measured once; None where it cannot be."""
    here, device = machine(), "cuda" if uses_gpu(REFERENCE_MAKER) else "cpu"
    facts: list[object] = [here.cpu, here.threads, here.memory_bytes, here.gpus, here.driver, device]
    if device == "cuda":
        facts.append(for_a_job())  # Of several GPUs the job's own is timed.

    def build(folder: Path) -> Bandwidth:
        python = interpreter(REFERENCE_MAKER, sys.executable) if device == "cuda" else sys.executable
        found, _ = work(
            "workbench.worker.measure.bandwidth:copy_bandwidth",
            BandwidthRequest(here.threads, device),
            Bandwidth,
            show,
            "copy bandwidth",
            python=python,
            limit_s=300,
        )
        return found

    try:
        return entry("bandwidth", digest(facts), Bandwidth, build)[1].bytes_per_s
    except (WorkFailed, UserError) as problem:
        show.say(f"no fraction of the memory's bandwidth: copying could not be measured: {problem}")
        return None
