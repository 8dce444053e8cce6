"""Many requests at once: as many as there are slots, or at a rate, whatever becomes of those before.

The clock is the event loop's. How late each request was sent and how late the loop itself ticked stand beside the
answers: a client that has no time of its own would pass for a slow server.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from workbench.records import Arrivals, LoadPoint, Request
from workbench.serving.client import Answer, Wanted
from workbench.serving.faults import Busy, Gone

Ask = Callable[[Wanted], Awaitable[Answer]]
TICK_S = 0.01
MOST_GONE = 5
"""Requests in a row that nobody answered, after which no more are sent."""
BUSY_S = 1.0
"""How long a slot waits after a server took no more."""


class Cut(asyncio.CancelledError):
    """A load that somebody ended; `point` is what had been answered."""

    def __init__(self, point: LoadPoint) -> None:
        super().__init__()
        self.point = point


class Load:
    """The requests of one point; `gone` once the server is."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._now = asyncio.get_running_loop().time
        self._began = self._now()
        self._sent: dict[int, Request] = {}
        self._missed = 0

    @property
    def gone(self) -> bool:
        return self._missed >= MOST_GONE

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return self._now() - self._began

    async def send(self, number: int, wanted: Wanted, due_s: float) -> None:
        """Send a request that should be sent `due_s` after the beginning; its sample is kept under its number."""
        sent_s = self.elapsed_s
        answer = await self._ask(wanted)
        self._missed = self._missed + 1 if isinstance(answer.fault, Gone) else 0
        late_s = max(0.0, round(sent_s - due_s, 6))
        self._sent[number] = replace(answer.request, sent_s=round(sent_s, 6), late_s=late_s)
        if isinstance(answer.fault, Busy):
            await asyncio.sleep(BUSY_S)

    def point(self, arrivals: Arrivals, level: float, warmup: int, lags: list[float]) -> LoadPoint:
        requests = [self._sent[number] for number in sorted(self._sent)]
        return LoadPoint(arrivals, level, requests, min(warmup, len(requests)), lags)


async def closed(ask: Ask, wanted: Sequence[Wanted], slots: int) -> tuple[LoadPoint, bool]:
    """Each slot sends its next request when its last has ended; and whether the server was gone."""
    load, left = Load(ask), iter(enumerate(wanted))

    async def slot() -> None:
        for number, each in left:
            if load.gone:
                return
            await load.send(number, each, load.elapsed_s)

    async with _ticking() as lags:
        try:
            await asyncio.gather(*(slot() for _ in range(slots)))
        except asyncio.CancelledError:
            raise Cut(load.point("closed", slots, 0, _told(lags))) from None
    return load.point("closed", slots, 0, _told(lags)), load.gone


async def opened(
    ask: Ask, wanted: Sequence[Wanted], rate: float, poisson: bool, warmup: int, seed: int
) -> tuple[LoadPoint, bool]:
    """Requests at a rate a second, at even times or (Poisson) with exponentially distributed ones between; and whether
    the server was gone. The first `warmup` are in no figure."""
    load, chance = Load(ask), random.Random(seed)
    how: Arrivals = "poisson" if poisson else "constant"

    async def sending() -> None:
        due_s = 0.0
        async with asyncio.TaskGroup() as sent:
            for number, each in enumerate(wanted):
                await asyncio.sleep(due_s - load.elapsed_s)
                if load.gone:
                    break
                sent.create_task(load.send(number, each, due_s))
                due_s += chance.expovariate(rate) if poisson else 1 / rate

    async with _ticking() as lags:
        try:
            await sending()
        except asyncio.CancelledError:
            raise Cut(load.point(how, rate, warmup, _told(lags))) from None
    return load.point(how, rate, warmup, _told(lags)), load.gone


@contextlib.asynccontextmanager
async def _ticking() -> AsyncIterator[list[float]]:
    """Yields a list that a clock beside the load writes into how late each of its ticks was."""
    lags: list[float] = []
    now = asyncio.get_running_loop().time

    async def tick() -> None:
        while True:
            due = now() + TICK_S
            await asyncio.sleep(TICK_S)
            lags.append(now() - due)

    ticking = asyncio.create_task(tick())
    try:
        yield lags
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking


def _told(lags: list[float]) -> list[float]:
    """Median, 99 % and the most of them, seconds."""
    found = sorted(lags) or [0.0]
    return [max(0.0, round(found[int(share * (len(found) - 1))], 6)) for share in (0.5, 0.99, 1.0)]
