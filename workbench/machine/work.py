"""A worker that has the machine to itself: the lock, the progress, the log, and what the step cost."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Generator
from typing import Any

from workbench.console import Show
from workbench.disk import disk_faults
from workbench.gpus import gpus
from workbench.home import home, machine_lock
from workbench.machine import isolate
from workbench.machine.monitor import Monitor
from workbench.records import digest


def work(
    function: str,
    payload: Any,
    show: Show,
    text: str,
    *,
    python: str = sys.executable,
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Run one worker alone on this machine; its value, and what it cost (`seconds`, `peak_rss_bytes`, `memory`,
    `conditions`).

    Raises `UserError` for what the user can mend and `WorkFailed` for the rest.
    """
    running = turns(function, payload, show, text, python=python, limit_s=limit_s, environment=environment)
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def turns(
    function: str,
    payload: Any,
    show: Show,
    text: str,
    *,
    python: str = sys.executable,
    limit_s: float,
    environment: dict[str, str] | None = None,
) -> Generator[None, None, tuple[Any, dict[str, Any]]]:
    """The same as a generator, which stands still where the worker waits for its next turn; closing it ends the worker.

    The machine is its own only while it works.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = home() / "logs" / f"{stamp}-{digest([function, text, time.time_ns()])[:8]}"
    monitor, reply, turn = Monitor(watched=gpus(os.environ | (environment or {}))), None, 1
    with isolate.Worker(function, payload, workdir=folder, python=python, environment=environment) as worker:
        while reply is None:
            if turn > 1:
                yield
                monitor.resume()
            what = text if turn == 1 else f"{text}, turn {turn}"
            # The lock first: what a step took is not what it waited.
            with (
                machine_lock(lambda: show.say("waiting for another workbench run to end")),
                show.task(what) as progress,
                disk_faults(home()),
            ):
                reply = worker.resume(time_limit_s=limit_s, on_progress=progress, on_sample=monitor)
            turn += 1
    value = isolate.answer(reply, folder)
    shutil.rmtree(folder, ignore_errors=True)
    memory = monitor.memory()
    cost = {"seconds": round(reply.duration_s, 3), "peak_rss_bytes": memory.get("peak_rss")}
    return value, cost | {"memory": memory, "conditions": monitor.conditions()}
