"""A worker that has the machine to itself: the lock, the progress, the log, and what the step cost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

from workbench.console import Show
from workbench.disk import disk_faults
from workbench.errors import UserError, WorkFailed
from workbench.gpus import for_a_job, gpus
from workbench.home import WAITING, home, machine_lock, who
from workbench.machine import isolate
from workbench.machine.monitor import Monitor
from workbench.records import Cost, digest, from_json, to_json
from workbench.scratch import held, temporary

Answer = TypeVar("Answer")


def ask(function: str, payload: object, *, python: str = sys.executable, limit_s: float) -> object:
    """What a worker answers that takes a moment of one core, so that it does not wait for the machine.

    Raises as `work` does.
    """
    with held(_log_folder(function)) as folder, temporary() as place:
        told = isolate.call(
            function, payload, workdir=folder, python=python, time_limit_s=limit_s, environment=_places(place)
        )
        value: object = _answer(told, folder)
    return value


def work(
    function: str,
    request: object,
    answer: type[Answer],
    show: Show,
    text: str,
    *,
    python: str = sys.executable,
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> tuple[Answer, Cost]:
    """Run one worker alone on this machine; its answer to the request, as a record of the type `answer`, and its cost.

    It has one GPU, the first that is visible, unless `environment` says otherwise (`for_a_job`).

    Raises `UserError` for what the user can mend and `WorkFailed` for the rest.
    """
    running = in_rounds(
        function, request, answer, show, text, python=python, limit_s=limit_s, environment=environment, told=True
    )
    while True:
        try:
            next(running)
        except StopIteration as end:
            done: tuple[Answer, Cost] = end.value
            return done


def in_rounds(
    function: str,
    request: object,
    answer: type[Answer],
    show: Show,
    text: str,
    *,
    python: str = sys.executable,
    limit_s: float,
    environment: dict[str, str] | None = None,
    told: bool = False,
) -> Generator[None, None, tuple[Answer, Cost]]:
    """The same as a generator, which stands still where the worker waits for its next round; closing it ends it.

    The machine is its own only while it works. Said is what the worker told last in the first of several rounds, or,
    if it is to be `told`, how long its only one took.
    """
    given = for_a_job() | (environment or {})
    monitor, reply, round_, latest = Monitor(watched=gpus(os.environ | given)), None, 1, ""

    def heard(done: float, total: float, detail: str) -> None:
        nonlocal latest
        latest = detail
        progress(done, total, detail)

    with (
        held(_log_folder(function)) as folder,
        temporary() as place,
        isolate.Worker(
            function,
            to_json(request),
            workdir=folder,
            python=python,
            environment={**given, **_places(place)},
        ) as worker,
    ):
        while reply is None:
            if round_ > 1:
                yield
                monitor.resume()
            what = text if round_ == 1 else f"{text}, round {round_}"
            # The lock first: what a step took is not what it waited.
            with (
                machine_lock(lambda other: show.say(WAITING + other), who(text)),
                show.task(what, told) as progress,
                disk_faults(home()),
            ):
                reply = worker.resume(time_limit_s=limit_s, on_progress=heard, on_sample=monitor)
            if reply is None and round_ == 1:
                show.say(f"{text}: {latest}")
            round_ += 1
        value: Answer = _answer(reply, folder, answer)
    memory = monitor.memory()
    repeats_s = getattr(value, "conditions", {}).get("repeats_s")
    return value, Cost(round(reply.duration_s, 3), memory.get("peak_rss"), memory, monitor.conditions(repeats_s))


def _log_folder(function: str) -> Path:
    """A folder of its own for a worker, which goes with it unless it fails."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return home() / "logs" / f"{stamp}-{digest([function, time.time_ns()])[:8]}.partial"


def _places(temporary_files: Path) -> dict[str, str]:
    """Where a worker's engine leaves what: what it compiled is for the next one."""
    kept = {} if "TORCHINDUCTOR_CACHE_DIR" in os.environ else {"TORCHINDUCTOR_CACHE_DIR": str(home() / "compiled")}
    return {"TMPDIR": str(temporary_files), **kept}


def _answer(reply: isolate.Reply, folder: Path, kind: Any = object) -> Any:
    """A reply's value as a record; a failure's folder is kept, under its final name."""
    final = folder.with_suffix("")
    try:
        return from_json(kind, isolate.answer(reply, final))
    except (UserError, WorkFailed, ValueError) as error:
        folder.rename(final)
        if isinstance(error, ValueError):
            raise WorkFailed(f"no answer to what was asked: {error} (log: {final / 'log.txt'})") from None
        raise
