"""Load on a server of known speed, by a clock that jumps."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable

import pytest

from tests.serving import virtual_clock
from workbench.records import LoadPoint, Request
from workbench.serving.client import Answer, Wanted
from workbench.serving.faults import Busy, Fault, Gone
from workbench.serving.load import MOST_GONE, closed, opened

SERVICE_S = 0.1


def wanted(many: int) -> list[Wanted]:
    return [Wanted(f"prompt {number}", 10, 4) for number in range(many)]


def server(
    slots: int, fault: Callable[[int], Fault | None] = lambda number: None
) -> Callable[[Wanted], Awaitable[Answer]]:
    """One that takes `SERVICE_S` a request, so many at once, the others wait."""
    free = asyncio.Semaphore(slots)
    asked = 0

    async def ask(each: Wanted) -> Answer:
        nonlocal asked
        asked, number = asked + 1, asked
        now = asyncio.get_running_loop().time
        began = now()
        if found := fault(number):
            return Answer(Request(0, 0, 10, 0.0, error=str(found)), None, found)
        async with free:
            await asyncio.sleep(SERVICE_S)
        took = now() - began
        return Answer(Request(0, 0, 10, took, took, [], [each.new_tokens]), "usage")

    return ask


def test_slots_are_always_busy() -> None:
    async def run() -> tuple[LoadPoint, bool]:
        return await closed(server(100), wanted(40), 4)

    point, gone = virtual_clock.run(run())
    assert (point.arrivals, point.level, len(point.requests), gone) == ("closed", 4, 40, False)
    assert {round(each.end_s, 3) for each in point.requests} == {SERVICE_S}
    assert max(each.sent_s for each in point.requests) == pytest.approx(SERVICE_S * 9)
    for moment in (0.05, 0.45, 0.95):
        assert sum(each.sent_s <= moment < each.sent_s + each.end_s for each in point.requests) == 4
    assert point.lag_s == [0, 0, 0], "nothing is late by a clock that waits for everybody"


@pytest.mark.parametrize("poisson", [False, True])
def test_a_rate_does_not_wait_for_a_slow_server(poisson: bool) -> None:
    async def run() -> tuple[LoadPoint, bool]:
        return await opened(server(1), wanted(2000), 50.0, poisson, 400, seed=1)

    point, _ = virtual_clock.run(run())
    gaps = [b.sent_s - a.sent_s for a, b in zip(point.requests, point.requests[1:], strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.02 if poisson else 0.0, rel=0.1, abs=1e-5)
    assert all(each.late_s < 1e-6 for each in point.requests)
    assert (point.warmup, len(point.counted)) == (400, 1600)
    assert point.requests[-1].end_s > 100, "a tenth of a second each, fifty times as many as it can"


def test_the_wait_of_an_md1_queue() -> None:
    """W = rho D / (2 (1 - rho)), by Pollaczek and Khinchine."""

    async def run() -> tuple[LoadPoint, bool]:
        return await opened(server(1), wanted(5000), 6.0, True, 500, seed=2)

    point, _ = virtual_clock.run(run())
    wait = statistics.fmean(each.end_s for each in point.counted) - SERVICE_S
    assert wait == pytest.approx(0.6 * SERVICE_S / (2 * 0.4), rel=0.1)


def test_a_server_that_is_gone_is_not_asked_for_ever() -> None:
    def dies(number: int) -> Fault | None:
        return Gone("nobody listens") if number >= 10 else None

    async def run(how: str) -> tuple[LoadPoint, bool]:
        if how == "closed":
            return await closed(server(100, dies), wanted(1000), 2)
        return await opened(server(100, dies), wanted(1000), 5.0, False, 3, seed=1)

    for how in ("closed", "opened"):
        point, gone = virtual_clock.run(run(how))
        assert gone and 10 + MOST_GONE <= len(point.requests) <= 12 + 2 * MOST_GONE
        assert sum(not each.error for each in point.requests) == 10, "what was answered is kept"


def test_a_busy_server_is_given_time() -> None:
    async def run() -> tuple[LoadPoint, bool, float]:
        point, gone = await closed(server(9, lambda number: Busy(429, "") if number % 2 else None), wanted(20), 1)
        return point, gone, asyncio.get_running_loop().time()

    point, gone, took = virtual_clock.run(run())
    assert not gone and sum(bool(each.error) for each in point.requests) == 10
    assert took == pytest.approx(10 * (1 + SERVICE_S), rel=0.01)
