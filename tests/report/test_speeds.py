"""Rates and their intervals against brute force: numpy's own formulas on samples drawn with a seed."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.rows import a_row
from workbench.records import Row, Served, Speed
from workbench.report import speeds
from workbench.report.speeds import further_rates, itl


def a_speed(chance: random.Random, prompt_tokens: int, new_tokens: int, batch: int, repeats: int) -> Speed:
    return Speed(
        prompt_tokens,
        new_tokens,
        batch,
        [chance.uniform(0.1, 2) for _ in range(repeats)],
        [[chance.uniform(0.01, 0.2) for _ in range(new_tokens - 1)] for _ in range(repeats)],
        [[batch] * (new_tokens - 1) for _ in range(repeats)],
        [chance.uniform(1, 9) for _ in range(repeats)],
        [repeats],
    )


def measured(*found: Speed, served: list[Served] | None = None, **memory: float) -> Row:
    row = a_row(memory=memory)
    assert row.measurement is not None
    return replace(row, measurement=replace(row.measurement, speeds=list(found), served=served or []))


def test_the_ranks_are_the_most_inward_that_keep_95_percent() -> None:
    for count in range(6, 120):
        low, high = speeds.interval([float(i) for i in range(1, count + 1)]) or (0, 0)
        assert low + high == count + 1
        inside = [1 - 2 * sum(math.comb(count, i) for i in range(int(low) + more)) / 2**count for more in (0, 1)]
        assert inside[0] >= 0.95 > inside[1]


def test_few_samples_have_students_interval_of_their_logarithms() -> None:
    for count, tabled in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776)):
        samples = [random.Random(count * 10 + i).uniform(1, 9) for i in range(count)]
        logs = np.log(samples)
        half = tabled * logs.std(ddof=1) / math.sqrt(count)
        assert speeds.interval(samples) == pytest.approx((np.exp(logs.mean() - half), np.exp(logs.mean() + half)))
    assert speeds.interval([1e-300, 1e300]) is None, "no number is that large"


def test_rounds_count_by_the_mean_of_their_logarithms_and_the_interval_reaches_the_median() -> None:
    samples, rounds = [1.0, 4.0, 3.0, 3.0, 3.0, 5.0], [2, 1, 3]
    means = [2.0, 3.0, 45 ** (1 / 3)]
    assert speeds.interval(samples, rounds) == pytest.approx(speeds.interval(means))
    low, high = speeds.interval([2.0, 2.1, 2.0, 2.1, 9.0, 9.0, 9.0], [2, 2, 3]) or (0, 0)
    assert low < 2.1 < 9.0 < high
    # The means of the rounds are all 2, the median of all is 4, then 1.
    assert speeds.interval([4.0, 1.0, 4.0, 4.0, 1.0, 2.0, 4.0, 2.0, 1.0], [2, 3, 4]) is not None
    assert speeds.interval([4.0, 4.0, 0.5, 4.0, 4.0, 0.5], [3, 3]) == pytest.approx((2.0, 4.0))
    assert speeds.interval([1.0, 1.0, 8.0, 1.0, 1.0, 8.0], [3, 3]) == pytest.approx((1.0, 2.0))
    # One sample a round is a sample, and a single round says nothing of drift.
    six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert speeds.interval(six, [1] * 6) == speeds.interval(six, [6]) == speeds.interval(six) == (1.0, 6.0)


def test_rates_are_tokens_of_the_whole_batch_a_second() -> None:
    chance = random.Random(1)
    for batch in (1, 3):
        speed = a_speed(chance, 50, 5, batch, 4)
        row = measured(speed)
        assert speeds.prefill_samples(row) == pytest.approx([50 * batch / s for s in speed.first_token_s])
        assert speeds.decode_samples(row) == pytest.approx([4 * batch / sum(steps) for steps in speed.step_s])
        assert speeds.ttft_samples(row) == speed.first_token_s
        assert speeds.energy_j_per_token(row) == pytest.approx(np.median(speed.energy_j) / (5 * batch))
        every = [step for steps in speed.step_s for step in steps]
        for share in (0.0, 0.5, 0.95, 1.0):
            assert itl(share)(row) == pytest.approx(np.quantile(every, share))
        assert speeds.median_interval(row, speeds.decode_samples) == speeds.interval(speeds.decode_samples(row))


def test_the_bandwidth_is_of_the_least_that_a_step_reads() -> None:
    speed = replace(a_speed(random.Random(2), 60, 20, 4, 3), step_tokens=[[4, 4] + [2] * 17] * 3)
    row = measured(speed, weights=7e8, kv_cache=1e8)
    row = replace(row, machine=replace(row.machine, copy_bytes_per_s=1e10))
    steps_s = np.median([19 / sum(steps) for steps in speed.step_s])
    assert speeds.bandwidth_fraction(row) == pytest.approx((7e8 + 1e8 * (60 + 10) / 80) * steps_s / 1e10)
    for lost in ({"weights": 7e8}, {"kv_cache": 1e8}, {"weights": 0.0, "kv_cache": 1e8}):
        assert speeds.bandwidth_fraction(replace(measured(speed, **lost), machine=row.machine)) is None
    empty = measured(speed, weights=7e8, kv_cache=0.0)
    assert speeds.bandwidth_fraction(replace(empty, machine=row.machine)) == pytest.approx(7e8 * steps_s / 1e10)
    assert speeds.bandwidth_fraction(empty) is None, "nobody measured what the machine copies"
    assert speeds.bandwidth_fraction(replace(measured(), machine=row.machine)) is None
    assert speeds.bandwidth_fraction(replace(a_row(measured=False), machine=row.machine)) is None


def test_further_points_and_what_was_served_are_named_and_timed() -> None:
    chance = random.Random(3)
    points = [a_speed(chance, *shape, 3) for shape in ((100, 3, 1), (2048, 9, 1), (512, 5, 8))]
    groups = [Served(8, 100, [5, 7, 4], [2.0, 4.0, 1.0], way, [3]) for way in (True, False)]
    found = further_rates(measured(*points, served=groups))
    assert [rate.name for rate in found] == [
        "pp2048",
        "tg9 @ d2048",
        "pp512 b8",
        "tg5 @ d512 b8",
        "served b8",
        "served b8 by groups",
    ]
    assert found[0].median == pytest.approx(2048 / np.median(points[1].first_token_s))
    assert found[3].median == pytest.approx(np.median([4 * 8 / sum(steps) for steps in points[2].step_s]))
    assert found[3].interval == speeds.interval([4 * 8 / sum(steps) for steps in points[2].step_s])
    assert (found[4].median, found[5].median) == (8.0, 8.0)
    assert further_rates(measured(points[0])) == further_rates(a_row(measured=False)) == []


def test_steps_without_a_token_or_a_time_are_no_pause_between_tokens() -> None:
    speed = Speed(10, 4, 2, [0.5], [[0.1, 0.2, 0.3]], [[2, 0, 2]], [], [1])
    assert itl(0.5)(measured(speed)) == pytest.approx(0.2)
    assert itl(1.0)(measured(replace(speed, step_tokens=[[2, 0, 0]]))) == pytest.approx(0.1)
    assert itl(0.5)(measured()) is None
    assert speeds.energy_j_per_token(measured(speed)) is None
    assert speeds.energy_j_per_token(measured()) is speeds.headline(a_row(measured=False)) is None
