"""The search for the largest rate, on queues whose true rate is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import median

import pytest

from workbench.profile.largest_rate import ATTAINED, Found, Trial, crossing, largest_rate
from workbench.records import Request
from workbench.report.loads import keeps, kept

SERVICE_S = 0.1
REQUESTS = 400


def md1_rate(limit_s: float) -> float:
    """The largest rate at which `ATTAINED` of the requests of an M/D/1 queue are done within a limit.

    The waiting time is at most t with probability (1 - rho) * sum over k <= t / D of (rate (k D - t))^k / k! *
    exp(-rate (k D - t)) (A. K. Erlang, 1909); it falls with the rate.
    """

    def share(rate: float) -> float:
        wait = limit_s - SERVICE_S
        terms = [rate * (k * SERVICE_S - wait) for k in range(int(wait / SERVICE_S + 1e-9) + 1)]
        return (1 - rate * SERVICE_S) * math.fsum(x**k / math.factorial(k) * math.exp(-x) for k, x in enumerate(terms))

    low, high = 0.0, 1 / SERVICE_S
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= ATTAINED else (low, middle)
    return low


def md1(chance: random.Random, limit_s: float) -> Callable[[float], tuple[int, int]]:
    """Trials on such a queue: each from an empty one, warmed up by a quarter more."""

    def trial(rate: float) -> tuple[int, int]:
        wait, kept = 0.0, 0
        for number in range(REQUESTS * 5 // 4):
            kept += number >= REQUESTS // 4 and wait + SERVICE_S <= limit_s
            wait = max(0.0, wait + SERVICE_S - chance.expovariate(rate))
        return kept, REQUESTS

    return trial


def searched(trial: Callable[[float], tuple[int, int]], first: float = 2.0) -> Found:
    search = largest_rate(first)
    rate = next(search)
    while True:
        try:
            rate = search.send(trial(rate))
        except StopIteration as end:
            found: Found = end.value
            return found


def test_the_formula_is_the_queues() -> None:
    rate = md1_rate(0.5)
    kept, asked = 0, 0
    for seed in range(50):
        more = md1(random.Random(seed), 0.5)(rate)
        kept, asked = kept + more[0], asked + more[1]
    assert kept / asked == pytest.approx(ATTAINED, abs=0.01)


@pytest.mark.parametrize("limit_s", [0.3, 0.5])
def test_the_true_rate_is_inside_the_interval(limit_s: float) -> None:
    truth = md1_rate(limit_s)
    found = [searched(md1(random.Random(seed), limit_s)) for seed in range(100)]
    assert sum(each.low <= truth <= each.high for each in found) >= 93
    widths = sorted(each.high / each.low for each in found)
    assert widths[50] < 1.3 and widths[97] < 2, "an interval of everything would hold it too"


def test_a_server_that_jumps_from_all_to_none() -> None:
    found = searched(lambda rate: (100 if rate <= 7.3 else 0, 100))
    assert found.low <= 7.3 <= found.high < 1.25 * found.low


def test_no_rate_is_small_enough_or_too_large() -> None:
    assert searched(lambda rate: (0, 100))[:2] == (0.0, pytest.approx(2.0 / 512))
    assert searched(lambda rate: (100, 100))[:2] == (pytest.approx(1024.0), math.inf)


def test_no_line_through_trials_of_one_side() -> None:
    assert crossing([Trial(rate, 100, 100) for rate in (1.0, 1.1, 1.2, 1.3, 1.4)]) is None
    assert crossing([Trial(1.0, 100, 100), Trial(2.0, 90, 100)]) is None
    rising = [Trial(rate, kept, 100) for rate, kept in ((1.0, 60), (1.2, 70), (1.4, 85), (1.6, 93), (1.8, 99))]
    assert crossing(rising) is None


def queue(rate: float, chance: random.Random, service_s: float = 0.05, asked: int = 100) -> list[Request]:
    """Requests at a rate to a server that answers one after the other, from an empty queue."""
    found, at_s, wait_s = [], 0.0, 0.0
    for _ in range(asked):
        found.append(Request(at_s, 0.0, 1, wait_s + service_s, wait_s + service_s, [], [1], ""))
        gap_s = chance.expovariate(rate)
        at_s, wait_s = at_s + gap_s, max(0.0, wait_s + service_s - gap_s)
    return found


def test_a_rate_that_cannot_go_on_is_not_kept() -> None:
    """A hundred requests at once are all answered in five seconds by a server of twenty a second."""
    burst = queue(1000.0, random.Random(0))
    assert all(keeps(each, {"e2e": 5.1}) for each in burst) and kept(burst, {"e2e": 5.1}) <= 3
    assert kept(queue(10.0, random.Random(0)), {"e2e": 5.0}) == 100
    assert kept(queue(10.0, random.Random(0)), {"e2e": 0.01}) == 0
    assert kept(queue(1000.0, random.Random(0), asked=4), {"e2e": 5.0}) == 4, "too few to tell"


def test_the_largest_rate_under_a_wide_limit_is_what_the_server_answers() -> None:
    lows, highs = [], []
    for seed in range(20):
        chance = random.Random(seed)
        low, high, _ = searched(lambda rate, chance=chance: (kept(queue(rate, chance), {"e2e": 5.0}), 100))
        lows.append(low)
        highs.append(high)
    assert 16 < median(lows) < 20 < median(highs) < 24
