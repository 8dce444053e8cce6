"""Where steps are found, against the rule in numpy; and what a step and a series say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.rows import a_row, compared
from workbench.records import Row
from workbench.report.table import build
from workbench.report.verdicts.steps import (
    Series,
    SeriesPoint,
    Step,
    find_steps,
    levels,
    point_of,
    series_like,
    series_of,
    steps_of,
)


def by_the_rule(values: list[float], threshold: float) -> list[int]:
    """The module's docstring once more: at every place, then the best of each run of places."""
    logs = np.log(values)
    noise = np.median(np.abs(np.diff(logs))) / (0.67449 * math.sqrt(2))
    jumps = []
    for place in range(3, len(values) - 2):
        old, new = logs[max(place - 7, 0) : place], logs[place : place + 7]
        a, b = np.median(old), np.median(new)
        error = noise * math.sqrt(math.pi / 2) * math.hypot(len(old) ** -0.5, len(new) ** -0.5)
        begun = abs(logs[place] - b) <= abs(logs[place] - a)
        if begun and abs(b - a) >= 0.999 * math.log(1 + threshold) and abs(b - a) > 4 * error:
            jumps.append(place)
    found: list[int] = []
    for run in np.split(np.array(jumps, dtype=int), np.flatnonzero(np.diff(jumps) > 1) + 1) if jumps else []:
        around = slice(max(run[0] - 7, 0), run[-1] + 7)

        def left_over(place: int, around: slice = around) -> float:
            sides = logs[around.start : place], logs[place : around.stop]
            return float(sum(np.abs(side - np.median(side)).sum() for side in sides))

        best = int(min(run, key=left_over))
        if not found or best - found[-1] >= 3:
            found.append(best)
    return found


@pytest.mark.parametrize("threshold", [0.005, 0.05])
def test_steps_are_those_of_the_rule(threshold: float) -> None:
    chance = np.random.default_rng(11)
    counts = []
    for trial in range(80):
        parts = [int(chance.integers(2, 20)) for _ in range(int(chance.integers(2, 5)))]
        heights = np.cumsum(chance.choice([-3.0, -1.0, -0.5, 0.0, 1.0, 2.0], len(parts))) * 2 * threshold
        noise = threshold * float(chance.choice([0.0, 0.05, 0.2, 0.5]))
        logs = np.concatenate([np.full(n, height) for n, height in zip(parts, heights, strict=True)])
        logs += chance.normal(0, 1, len(logs)) * noise + (chance.random(len(logs)) < 0.03) * 3 * threshold
        values = (40 * np.exp(logs)).tolist()
        expected = by_the_rule(values, threshold) if len(values) >= 6 else []
        assert find_steps(values, threshold) == expected, (trial, values)
        counts.append(len(expected))
    assert min(counts) == 0 and max(counts) >= 3 and sum(counts) > 50, "or the test shows nothing"


def test_six_points_make_a_step_and_five_do_not() -> None:
    assert find_steps([10.0] * 3 + [11.0] * 3, 0.05) == [3]
    assert find_steps([10.0] * 3 + [11.0] * 2, 0.05) == find_steps([10.0] * 2 + [11.0] * 3, 0.05) == []


def test_a_step_is_of_the_size_that_matters_or_more() -> None:
    assert find_steps([10.0] * 5 + [10.5] * 5, 0.05) == [5]
    assert find_steps([10.0] * 5 + [10.49] * 5, 0.05) == find_steps([10.5] * 5 + [10.01] * 5, 0.05) == []


def test_levels_are_medians_of_seven() -> None:
    values = [float(2**i) for i in range(20)]
    assert levels(values, 10) == (2.0**6, 2.0**13)
    assert levels(values, 2) == (1.5, 2.0**5)


def night(day: int, tok_s: float = 50.0, **more: object) -> Row:
    return a_row(step_s=[[1 / tok_s] * 2] * 3, started_at=f"2026-11-{day + 1:02}T02:00:00Z", **more)  # type: ignore[arg-type]


def steps(*rates: float) -> list[Step]:
    (series,) = series_of([night(day, rate) for day, rate in enumerate(rates)])
    return steps_of(series)


def test_a_loss_is_open_while_the_newest_three_are_as_far_from_the_old_level_as_matters() -> None:
    slow = [90.0] * 5
    assert [(step.worse, step.open) for step in steps(*[100.0] * 5, *slow)] == [(True, True)]
    # 95 of 100 is a loss of a twentieth, 95.2 is less; the median of the newest three decides.
    assert steps(*[100.0] * 5, *slow, 94.9, 94.9, 94.9)[0].open
    assert not steps(*[100.0] * 5, *slow, 95.2, 95.2, 95.2)[0].open
    assert steps(*[100.0] * 5, *slow, 100.0)[0].open
    assert [(step.worse, step.open) for step in steps(*slow, *[100.0] * 5)] == [(False, False)]


def test_more_perplexity_is_a_loss() -> None:
    rows = [a_row(windows=[(100, 300.0 + (day > 4))] * 2, started_at=f"2026-11-{day + 1:02}") for day in range(10)]
    (step,) = steps_of(series_of(rows)[0])
    assert (step.metric, step.worse, step.open) == ("perplexity", True, True)
    assert (step.before, step.after) == pytest.approx((math.exp(3.0), math.exp(3.01)))
    assert step.relative == pytest.approx(math.expm1(0.01))
    (gain,) = steps_of(series_of([replace(row, started_at=f"2026-11-{20 - n}") for n, row in enumerate(rows)])[0])
    assert (gain.worse, gain.open) == (False, False)


def test_steps_of_several_metrics_are_in_order_of_time() -> None:
    rows = [
        a_row(
            step_s=[[0.02 * (1.2 if day >= 9 else 1)] * 2] * 3,
            windows=[(100, 300.0 + (day >= 4))] * 2,
            started_at=f"2026-11-{day + 1:02}",
        )
        for day in range(14)
    ]
    found = steps_of(series_of(rows)[0])
    assert [(step.metric, step.first.at[-2:], step.last.at[-2:]) for step in found] == [
        ("perplexity", "05", "04"),
        ("decode_tok_s", "10", "09"),
    ]


def test_what_changed_with_a_step() -> None:
    old = SeriesPoint("a", {}, {"engine": "1", "gone": "2", "same": "3"}, None)
    new = SeriesPoint("b", {}, {"engine": "4", "new": "5", "same": "3", "commit": "c"}, None)
    series = Series("desk", "toy", series_of([night(0)])[0].pair, "e1", 1, (old, new))
    step = Step(series, "load_s", 4.0, 5.0, old, new, True, True)
    assert step.relative == pytest.approx(0.25)
    assert step.changed == {"engine": ("1", "4"), "gone": ("2", ""), "new": ("", "5"), "commit": ("", "c")}
    assert (old.commit, new.commit) == ("", "c")


def test_a_point_has_what_was_measured_and_is_more_than_nothing() -> None:
    point = point_of(compared(a_row(memory={"peak_rss": 5, "peak_vram": 0}), 0.0, "r7"))
    assert "kld_mean" not in point.values and "peak_vram_bytes" not in point.values
    assert (point.values["peak_rss_bytes"], point.values["top1_agreement"]) == (5, 0.5)
    assert point.versions == {"toy": "1.0", "reference": "r7"}
    assert point_of(a_row()).versions == {"toy": "1.0"}
    assert point_of(a_row(measured=False, error="no")).values == {}


def test_series_of_two_recipes_are_two_and_each_is_in_order_of_time() -> None:
    rows = [night(3), night(1), night(2, recipe="other"), night(0, recipe="other")]
    found = series_of(rows)
    assert [(series.recipe, [point.at[8:10] for point in series.points]) for series in found] == [
        ("toy", ["02", "04"]),
        ("other", ["01", "03"]),
    ]


def test_the_series_that_a_table_is_the_end_of() -> None:
    shown = [night(1), night(2), a_row("q", measured=False, error="no", evaluation=None, started_at="2026-11-01")]
    others = [
        night(0, machine="lab"),
        night(0, evaluation="e2"),
        night(0, measurement_version=99),
        a_row("r", started_at="2026-11-01"),
    ]
    found = series_like(build(shown, machine="desk"), series_of([*shown, *others]))
    assert [(one.pair.variant, one.machine, one.evaluation) for one in found] == [
        ("base", "desk", "e1"),
        ("q", "desk", ""),
    ]
    assert len({one.measurement_version for one in found}) == 1
    unscored = [night(1, evaluation=None)]
    assert len(series_like(build(unscored), series_of([*unscored, night(2)]))) == 1
