"""Steps carried to the machines of a Ray cluster; the only module that imports Ray.

A step is one Ray task, bound to the machine that the schedule chose, with the GPUs that it asks for, or all
processors of a machine without any. Ray does not try again what was lost: the schedule does, and counts.
Requests and answers are JSON of a few kilobytes; files go through the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from dataclasses import replace
from typing import Any

from workbench.cluster import node
from workbench.cluster.schedule import Place, Step
from workbench.errors import UserError, importing

SCHEME = "ray"
LOOK_S = 60.0
"""For how long a new machine may take to say what it is."""


class RayMachines:
    """The machines of a Ray cluster. None is started here: Ray listens on all of a machine's addresses.

    `address`: `ray` for the one this machine is part of, or that `RAY_ADDRESS` names, or `ray://HOST:PORT`.
    """

    def __init__(self, address: str) -> None:
        self._ray = ray = _imported()
        self._running: dict[Any, tuple[str, str]] = {}
        """What Ray calls a task -> the step's name and its machine's."""
        self._known: dict[str, Place] = {}
        where = (os.environ.get("RAY_ADDRESS") or "auto") if address == SCHEME else address
        try:
            _answers(where)
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR, namespace="workbench")
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"--on {address}: no Ray cluster answers there ({said}). Start one: ray start --head"
            ) from None

    def places(self) -> list[Place]:
        """The machines that are there now. Raises `UserError` for one whose program is another version."""
        alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
        asked = {}
        for id in alive:
            if id not in self._known:
                asked[id] = self._task(node.look, id, cpus=0).remote()
        for id, answer in asked.items():
            with contextlib.suppress(self._ray.exceptions.RayError):
                name = alive[id]["NodeManagerHostname"]
                told = self._ray.get(answer, timeout=LOOK_S)
                place = node.place_of(id, name, dict(alive[id].get("Labels") or {}), told)
                cpus = int(alive[id]["Resources"].get("CPU", 1))
                gpus = int(alive[id]["Resources"].get("GPU", 0))
                self._known[id] = replace(place, gpus=min(gpus, place.gpus), cpus=cpus)
        return [place for id, place in self._known.items() if id in alive]

    def begin(self, step: Step, place: Place, request: str) -> None:
        """Send a step to a machine."""
        share = place.share(step)
        task = self._task(node.run, place.id, place.cpus * share // place.room, share if place.gpus else 0)
        self._running[task.remote(request)] = step.name, place.name

    def wait(self, most_s: float) -> list[tuple[str, str | None, str]]:
        """(step, its answer, or None and why there is none) of those that came to an end; for so long at the most."""
        if not self._running:
            time.sleep(most_s)
            return []
        done, _ = self._ray.wait([*self._running], num_returns=1, timeout=most_s)
        # Whatever else is done by now.
        more, _ = self._ray.wait([*self._running], num_returns=len(self._running), timeout=0)
        found: list[tuple[str, str | None, str]] = []
        for reference in dict.fromkeys([*done, *more]):
            name, machine = self._running.pop(reference)
            try:
                found.append((name, self._ray.get(reference), ""))
            except self._ray.exceptions.RayTaskError as error:
                found.append((name, None, f"{machine}: {_last_line(error)}"))
            except self._ray.exceptions.RayError as error:
                found.append((name, None, f"{machine}: {type(error).__name__}"))
        return found

    def stop(self, name: str) -> None:
        """End a step that takes too long; it is then told of as lost."""
        for reference, (step, _) in self._running.items():
            if step == name:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; what still runs for this program ends."""
        self._ray.shutdown()

    def _task(self, function: Any, id: str, cpus: int, gpus: int = 0) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node_id=id, soft=False)
        # A process of its own for each step: what one leaves behind in memory or variables is not the next one's.
        return self._ray.remote(max_calls=1)(function).options(
            num_cpus=cpus, num_gpus=gpus, scheduling_strategy=where, max_retries=0
        )


def _answers(address: str) -> None:
    """Raise `OSError` if nobody listens there: Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass


def _imported() -> Any:
    with importing("ray, which --on needs,", "pip install 'ray[client]'"):
        import ray
        import ray.exceptions
    return ray


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
