"""Interleaved rounds: the repeats of a job lie apart in time, and between them others are measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator

import psutil

from workbench.engines import uses_gpu
from workbench.records import Row

ROUNDS = 5
"""In how many rounds a job's repeats are timed, at the most."""

APART_S = 60.0
"""Seconds between two rounds of a job: longer than a slow spell of a shared machine lasts."""

Rounds = Generator[None, None, Row]
"""A job: yields where it waits for its next round, returns its row."""

ENGINE_BYTES = 2 << 30
"""What an engine takes beside the weights, at the most, before another is loaded beside it."""


class Interleaved:
    """Jobs measured in rounds, one at work at a time: while one waits for its next round, the others have theirs.

    A round is due `APART_S` after the one before. So repeats of one job lie that far apart at the least, except at the
    end, when nobody is left to come between. Leaving ends whatever has not come to its end.
    """

    def __init__(self, ended: Callable[[Row], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._ended, self._clock = ended, clock
        self._waiting: list[tuple[float, Rounds, contextlib.ExitStack]] = []
        """Since when, what, and the locks it holds; the longest first."""

    def __enter__(self) -> Interleaved:
        return self

    def __exit__(self, *_: object) -> None:
        for _since, job, locks in self._waiting:
            job.close()
            locks.close()

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, job: Rounds, locks: contextlib.ExitStack) -> None:
        """The first round of a job, then every round that is due. `locks` are held until its row is stored."""
        self._round(job, locks)
        while self._waiting and self._clock() - self._waiting[0][0] >= APART_S:
            self._next()

    def finish(self) -> None:
        """The rest of every job, still interleaved."""
        while self._waiting:
            self._next()

    def _next(self) -> None:
        _since, job, locks = self._waiting.pop(0)
        self._round(job, locks)

    def _round(self, job: Rounds, locks: contextlib.ExitStack) -> None:
        with contextlib.ExitStack() as held:
            held.push(locks)
            try:
                next(job)
            except StopIteration as end:
                self._ended(end.value)
            else:
                self._waiting.append((self._clock(), job, held.pop_all()))


def room_beside(row: Row) -> bool:
    """Whether a job may be loaded while others wait: not on a GPU, whose memory engines take as a whole, and only if
    the machine has room for its weights in float32 and its engine."""
    return not uses_gpu(row.backend) and psutil.virtual_memory().available > 4 * row.artifact.parameters + ENGINE_BYTES
