"""Which step goes to which machine next. Knows no engine, no network and no clock, so that it can be tried on thousands
of steps in a second.

A greedy list: whenever a machine has room, the longest step that is ready and that it may take goes there. No machine
stands still while a step waits that it could take, so the end comes at most one longest step after that of the best
schedule (Graham 1969); with the longest first, a third of one (Graham's 4/3 bound).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

TRIES = 3
"""How often a step is begun before it is given up: what kills its machine three times is to blame itself."""


@dataclass(frozen=True)
class Place:
    """A machine that takes steps."""

    id: str
    kind: str
    """What its results are filed under: the same for all machines with such hardware."""
    gpus: int = 0
    cpus: int = 1
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many steps of one GPU it takes at once; without GPUs one."""
        return max(self.gpus, 1)

    def share(self, step: Step) -> int:
        """How much of its room a step takes: as many GPUs as there are at the most."""
        return min(step.gpus, self.room)


@dataclass(frozen=True)
class Step:
    """Work that one machine does in one go."""

    name: str
    after: frozenset[str] = frozenset()
    """Steps that must have come to their end before."""
    kind: str = ""
    """Only machines of this kind; empty: any."""
    gpus: int = 1
    """How many of a machine's GPUs it has to itself; a machine without any it has as a whole."""
    cost: float = 1.0
    """How long it takes, in any unit: what is longer goes first."""


@dataclass
class _At:
    """A machine, and how many steps of one GPU it has room for."""

    place: Place
    free: int


class Schedule:
    """Steps, machines, and what has become of each step; told of what happens, it answers with what to begin."""

    def __init__(self, steps: Iterable[Step], tries: int = TRIES) -> None:
        self.steps = {step.name: step for step in steps}
        self._tries = tries
        self._waiting = sorted(self.steps.values(), key=lambda step: -step.cost)
        self._ended: set[str] = set()
        self._lost: dict[str, int] = {}
        """Step -> how often its process or machine was lost."""
        self.retries = 0
        """How often a step was begun again."""
        self.given_up: dict[str, str] = {}
        """Step -> why."""
        self._at: dict[str, _At] = {}
        self._where: dict[str, str] = {}

    def join(self, places: Iterable[Place]) -> None:
        """Machines that are there; those known before stay as they are."""
        for place in places:
            if place.id not in self._at:
                busy = sum(place.share(self.steps[name]) for name, at in self._where.items() if at == place.id)
                self._at[place.id] = _At(place, place.room - busy)

    def leave(self, id: str) -> None:
        """A machine is gone, or is to get nothing for a while; what runs there is told of all the same."""
        self._at.pop(id, None)

    def begin(self) -> Iterator[tuple[Step, Place]]:
        """Steps to begin now, each with its machine."""
        left = []
        for number, step in enumerate(self._waiting):
            if not any(at.free for at in self._at.values()):
                left += self._waiting[number:]
                break
            at = self._room(step) if step.after <= self._ended else None
            if at is None:
                left.append(step)
                continue
            at.free -= at.place.share(step)
            self._where[step.name] = at.place.id
            yield step, at.place
        self._waiting = left

    def ended(self, name: str) -> None:
        """A step came to its end."""
        self._free(name)
        self._ended.add(name)

    def failed(self, name: str, why: str) -> bool:
        """A step was lost with its process or machine; whether it will be tried again."""
        self._free(name)
        lost = self._lost[name] = self._lost.get(name, 0) + 1
        if lost < self._tries:
            self.retries += 1
            step = self.steps[name]
            place = next((i for i, each in enumerate(self._waiting) if each.cost <= step.cost), len(self._waiting))
            self._waiting.insert(place, step)
            return True
        self.give_up(name, f"{why} ({lost} tries)")
        return False

    def give_up(self, name: str, why: str) -> None:
        """A step will not come to its end. What comes after it is begun all the same, and says what it lacks."""
        self.given_up[name] = why
        self._ended.add(name)

    def stranded(self) -> list[str]:
        """Give up what no machine can take that is there, if nothing runs that could lead to more; those steps."""
        if self._where:
            return []
        found = [step for step in self._waiting if step.after <= self._ended]
        self._waiting = [step for step in self._waiting if step not in found]
        for step in found:
            self.give_up(step.name, f"no machine {f'of kind {step.kind} ' if step.kind else ''}is left for it")
        return [step.name for step in found]

    def drop(self, names: Collection[str]) -> None:
        """Steps that wait and will not be begun; nobody is told of them."""
        dropped = [step for step in self._waiting if step.name in names]
        self._waiting = [step for step in self._waiting if step.name not in names]
        self._ended |= {step.name for step in dropped}

    @property
    def running(self) -> dict[str, str]:
        """Step -> the machine it runs on."""
        return dict(self._where)

    @property
    def places(self) -> list[Place]:
        """The machines that are there."""
        return [at.place for at in self._at.values()]

    @property
    def left(self) -> int:
        """How many steps have not come to their end."""
        return len(self.steps) - len(self._ended)

    def _room(self, step: Step) -> _At | None:
        """The machine with most room among those that may take it."""
        able = [at for at in self._at.values() if not step.kind or at.place.kind == step.kind]
        able = [at for at in able if at.free >= at.place.share(step)]
        return max(able, key=lambda at: at.free, default=None)

    def _free(self, name: str) -> None:
        at = self._at.get(self._where.pop(name, ""))
        if at is not None:
            at.free += at.place.share(self.steps[name])
