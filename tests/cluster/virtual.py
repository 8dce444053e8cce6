"""Machines that exist only on a clock: what real ones cannot be made to do on demand, thousands of times a second."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping

from workbench.cluster.schedule import Place, Step


class VirtualMachines:
    """Carries steps to nowhere; each takes its seconds on a clock that moves when it is waited for."""

    def __init__(self, places: list[Place], seconds: Mapping[str, float], overhead_s: float = 0.0) -> None:
        self.now = 0.0
        self.there = {place.id: place for place in places}
        self._seconds, self._overhead_s = seconds, overhead_s
        self._running: dict[str, tuple[float, str]] = {}
        self._ends: list[tuple[float, str]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.begun: Counter[str] = Counter()
        self.on: dict[str, str] = {}
        self.lost: list[str] = []
        self.poison: set[str] = set()
        """Steps that take their machine's process with them."""
        self.most_at_once: Counter[str] = Counter()

    def clock(self) -> float:
        return self.now

    def at(self, moment: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, len(self._events), do))

    def leave(self, id: str) -> None:
        """The machine dies with what runs there."""
        del self.there[id]
        self.lost += [name for name, (_, place) in self._running.items() if place == id]

    def places(self) -> list[Place]:
        return list(self.there.values())

    def begin(self, step: Step, place: Place, request: str) -> None:
        self.begun[step.name] += 1
        self.on[step.name] = place.id
        end = self.now + self._seconds[step.name] + self._overhead_s
        self._running[step.name] = end, place.id
        heapq.heappush(self._ends, (end, step.name))
        at_work = sum(on == place.id for _, on in self._running.values())
        self.most_at_once[place.id] = max(self.most_at_once[place.id], at_work)
        if place.id not in self.there:
            self.lost.append(step.name)

    def wait(self, most_s: float) -> list[tuple[str, str | None, str]]:
        found: list[tuple[str, str | None, str]] = []
        if not self.lost:
            ends = self._ends[0][0] if self._ends else self.now + most_s
            events = self._events[0][0] if self._events else float("inf")
            self.now = max(self.now, min(ends, events))
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        for name in self.lost:
            self._running.pop(name)
            self._ends = [each for each in self._ends if each[1] != name]
            heapq.heapify(self._ends)
            found.append((name, None, "the machine died"))
        self.lost = []
        while self._ends and self._ends[0][0] <= self.now:
            _, name = heapq.heappop(self._ends)
            self._running.pop(name)
            found.append((name, None, "killed") if name in self.poison else (name, "", ""))
        return found

    def stop(self, name: str) -> None:
        self.lost.append(name)

    def close(self) -> None:
        """Nothing is held."""
