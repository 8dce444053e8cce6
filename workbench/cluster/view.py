"""How far a run over many machines is: on a terminal what runs where, in a log a line every minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from workbench.cluster.schedule import Schedule
from workbench.console import Show, seconds

LINE_EVERY_S = 60.0


class View:
    """What is drawn of a schedule, or said of it where nothing is drawn."""

    def __init__(self, schedule: Schedule, show: Show, clock: Callable[[], float] = time.monotonic) -> None:
        self._schedule, self._show, self._clock = schedule, show, clock
        self._started = self._said = clock()
        self._since: dict[str, float] = {}
        self.failed = 0
        """Steps that told of something that failed."""

    def tell(self) -> None:
        """Say how far it is, if it is time to."""
        now, running = self._clock(), self._schedule.running
        self._since = {name: self._since.get(name, now) for name in running}
        if self._show.live:
            self._show.whole = self.words()
            self._show.table = self.lines
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            self._show.say(self.words())

    def words(self) -> str:
        """`41 of 200 steps, 16 running on 16 of 20 machines, 2 failed, 1 begun again, about 2 min left`."""
        schedule = self._schedule
        total, running = len(schedule.steps), schedule.running
        done = total - schedule.left
        at_work = len(set(running.values()))
        told = [f"{done} of {total} steps", f"{len(running)} running on {at_work} of {len(schedule.places)} machines"]
        told += [f"{self.failed + len(schedule.given_up)} failed"] if self.failed or schedule.given_up else []
        told += [f"{schedule.retries} begun again"] if schedule.retries else []
        if done and schedule.left:
            spent = self._clock() - self._started
            told.append(f"about {seconds(spent * schedule.left / done)} left")
        return ", ".join(told)

    def lines(self, width: int, height: int) -> Sequence[tuple[str, str | None]]:
        """A line for each machine: what runs there, and for how long; those at work first."""
        on: dict[str, list[str]] = {}
        for name, id in self._schedule.running.items():
            on.setdefault(id, []).append(name)
        places = sorted(self._schedule.places, key=lambda place: (place.id not in on, place.name, place.id))
        room = max(height, 1)
        shown = places if len(places) <= room else places[: room - 1]
        names = max((len(place.name) for place in shown), default=0)
        lines: list[tuple[str, str | None]] = []
        for place in shown:
            at = on.get(place.id, [])
            for_s = max((self._clock() - self._since[name] for name in at), default=0.0)
            what = f"{seconds(for_s):>12}  {'; '.join(at)}" if at else f"{'':12}  idle"
            lines.append((f"{place.name:{names}}  {what}"[:width], None if at else "dim"))
        if len(places) > len(shown):
            lines.append((f"and {len(places) - len(shown)} more machines", "dim"))
        return lines


def summary(schedule: Schedule, made: int, rows: int, machines: Mapping[str, int]) -> str:
    """What a run came to, in a line."""
    told = [f"{len(schedule.steps)} steps", f"{made} variants", f"{rows} rows"]
    told += [f"{schedule.retries} begun again"] if schedule.retries else []
    told += [f"{len(schedule.given_up)} given up"] if schedule.given_up else []
    where = ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in machines.items())
    return f"{', '.join(told)} on {where}"
