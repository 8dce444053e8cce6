"""Steps are found where they began; single noisy points and plain noise are none."""

from __future__ import annotations

import math
import random

import pytest

from tests.rows import a_row
from workbench.records import Row
from workbench.report.verdicts.steps import find_steps, series_of, steps_of


def night(day: int, tok_s: float, **more: object) -> Row:
    steps = [[1 / tok_s, 1 / tok_s]] * 3
    month, rest = divmod(day, 28)
    return a_row(step_s=steps, started_at=f"2026-{month + 1:02}-{rest + 1:02}T02:00:00Z", **more)  # type: ignore[arg-type]


def noise(count: int, level: float = 100.0, sigma: float = 0.015, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [level * math.exp(chance.gauss(0, sigma)) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_ten_percent_step_is_found_within_a_night_or_two(seed: int) -> None:
    values = noise(30, seed=seed) + noise(30, level=90, seed=1000 + seed)
    (place,) = find_steps(values, 0.05)
    assert abs(place - 30) <= 1


def test_without_noise_the_place_is_exact_even_near_the_ends() -> None:
    for place in range(3, 18):
        assert find_steps([14.9] * place + [14.9 * 1.01] * (20 - place), 0.005) == [place]
    assert find_steps([14.9] * 18 + [15.1] * 2, 0.005) == []  # two nights are no level yet


def test_a_single_noisy_point_is_no_step_and_neither_are_two() -> None:
    for seed in range(20):
        values = noise(60, seed=seed)
        values[30] *= 0.6
        values[31] *= 0.7
        values[50] *= 1.5
        assert find_steps(values, 0.05) == []


def test_noise_alone_is_no_step() -> None:
    found = [find_steps(noise(365, sigma=0.02, seed=seed), 0.05) for seed in range(30)]
    assert sum(map(len, found)) <= 1


def test_a_regression_that_was_mended_is_two_steps() -> None:
    values = noise(100, seed=1) + noise(12, level=85, seed=2) + noise(100, seed=3)
    first, second = find_steps(values, 0.05)
    assert abs(first - 100) <= 1 and abs(second - 112) <= 1


def test_a_step_says_where_it_began_and_with_what() -> None:
    old, new = {"engine": "1.0", "commit": "aaaa"}, {"engine": "1.1", "commit": "bbbb"}
    rows = [night(day, 100 if day < 10 else 88, versions=old if day < 10 else new) for day in range(20)]
    (series,) = series_of(rows)
    (step,) = steps_of(series)
    assert (step.metric, step.worse, step.open) == ("decode_tok_s", True, True)
    assert step.relative == pytest.approx(-0.12)
    assert step.first.at == rows[10].started_at and step.last.at == rows[9].started_at
    assert step.changed == {"engine": ("1.0", "1.1"), "commit": ("aaaa", "bbbb")}


def test_a_mended_regression_is_closed_and_a_gain_is_none() -> None:
    (series,) = series_of([night(day, 88 if 10 <= day < 20 else 100) for day in range(30)])
    assert [(step.worse, step.open) for step in steps_of(series)] == [(True, False), (False, False)]


def test_series_keep_apart_what_is_not_comparable_and_leave_out_what_cannot_run() -> None:
    rows = [
        night(0, 100),
        night(1, 100),
        night(1, 100, machine="lab"),
        night(1, 100, evaluation="e2"),
        night(1, 100, measurement_version=3),
        night(1, 100, options={"threads": 4}),
        a_row("q", measured=False, unsupported="no"),
        a_row("r", measured=False, error="it broke"),
    ]
    found = series_of(rows)
    assert [len(series.points) for series in found] == [2, 1, 1, 1, 1, 1]
    assert found[-1].points[0].error == "it broke" and found[-1].values("decode_tok_s") == []


def test_series_that_differ_only_in_an_option_say_so() -> None:
    rows = [night(day, 100, options={"kv_cache": kv}) for day in range(2) for kv in ("f16", "q8_0")]
    assert [series.label for series in series_of(rows)] == [
        "base on llamacpp (kv_cache f16)",
        "base on llamacpp (kv_cache q8_0)",
    ]
    assert series_of(rows[:1])[0].label == "base on llamacpp"
