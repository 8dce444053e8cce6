"""What a night is judged to be: planted regressions are found in the first night, plain nights raise no alarm.

The nights are simulated with a seed: every pair has its own level; nights differ by 1.5 % in speed, repeats by
0.7 %; one measurement in a hundred falls into a busy minute and is a quarter slower.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.rows import a_row, losing
from workbench.records import Row
from workbench.report.metrics import JUDGED
from workbench.report.verdicts.compare import compare
from workbench.report.verdicts.night import NIGHTS, TIMES, NightVerdict, judge, note_of, text
from workbench.report.verdicts.steps import series_of, steps_of

VARIANTS = ("base", "awq-4bit-g128", "gptq-4bit-g128", "gguf-Q8_0", "gguf-Q4_K_M", "gguf-Q2_K")
ENGINES = ("vllm", "llamacpp")
Plant = Callable[[str, str], tuple[float, float]]
"""(variant, engine) -> factors of speed and of perplexity."""


def untouched(variant: str, engine: str) -> tuple[float, float]:
    return 1.0, 1.0


class House:
    """A machine that measures: seeded noise around levels that stay."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.levels = {(v, e): math.exp(self.chance.uniform(2.5, 5.5)) for v in VARIANTS for e in ENGINES}
        self.measurements = 0

    def measure(self, variant: str, engine: str, at: str, plant: Plant) -> Row:
        self.measurements += 1
        speed, worse = plant(variant, engine)
        level = self.levels[variant, engine] * speed * math.exp(self.chance.gauss(0, 0.015))
        if self.chance.random() < 0.01:
            level *= 0.75
        rates = [level * math.exp(self.chance.gauss(0, 0.007)) for _ in range(3)]
        # Deterministic but for the last digits, and no two windows alike.
        nats = [255 * (2.6 + 0.1 * window) + self.chance.gauss(0, 1e-3) for window in range(6)]
        return a_row(
            variant,
            engine,
            windows=[(255, total + 255 * math.log(worse)) for total in nats],
            first_token_s=[100 / rate / 7 for rate in rates],
            step_s=[[1 / rate] * 2 for rate in rates],
            memory={"peak_rss": int(3e8 * math.exp(self.chance.gauss(0, 0.01)))},
            started_at=at,
            key=f"{variant}/{engine}",
        )

    def night(self, number: int, before: list[Row], notes: list[dict], plant: Plant = untouched) -> NightVerdict:  # type: ignore[type-arg]
        """A whole night as `workbench nightly` runs it: measure, judge, measure suspects again; rows and note kept."""
        day = f"{2026 + number // 336}-{number % 336 // 28 + 1:02}-{number % 28 + 1:02}"
        since, until = f"{day}T02:00:00Z", f"{day}T05:00:00Z"
        tonight = [self.measure(v, e, f"{day}T02:30:00Z", plant) for v in VARIANTS for e in ENGINES]
        while True:
            verdict = judge(before, tonight, notes)
            if not verdict.suspects:
                break
            for pair in verdict.suspects:
                count = sum(row.artifact.variant == pair.variant and row.backend == pair.backend for row in tonight)
                assert count < TIMES
                tonight.append(self.measure(pair.variant, pair.backend, f"{day}T04:0{count}:00Z", plant))
        before += tonight
        # What is older than ten nights decides nothing here; a test need not carry it.
        del before[: max(0, len(before) - 12 * len(VARIANTS) * len(ENGINES))]
        notes.append(note_of("toy", since, until, verdict))
        return verdict


def after(nights: int, seed: int) -> tuple[House, list[Row], list[dict]]:  # type: ignore[type-arg]
    house, rows, notes = House(seed), [], []  # type: ignore[var-annotated]
    for number in range(nights):
        house.night(number, rows, notes)
    return house, rows, notes


def test_two_hundred_nights_without_change_raise_at_most_two_alarms() -> None:
    house, rows, notes = House(2026), [], []  # type: ignore[var-annotated]
    verdicts = [house.night(number, rows, notes) for number in range(200)]
    alarms = [alarm for verdict in verdicts for alarm in verdict.alarms]
    assert len(alarms) <= 2, alarms
    assert verdicts[0].word == "first" and all(verdict.word == "good" for verdict in verdicts[1:] if not verdict.alarms)
    # And the price of being sure: at most a twentieth more measurements.
    assert house.measurements <= 1.05 * 200 * len(VARIANTS) * len(ENGINES)


def found_in(nights: int, seed: int) -> set[tuple[str, str, str | None]]:
    """The alarms of a night in which one pair of twelve decodes 10 % slower."""
    house, rows, notes = after(nights, seed)
    hit = lambda variant, engine: (1 / 1.1 if (variant, engine) == ("gguf-Q8_0", "llamacpp") else 1.0, 1.0)  # noqa: E731
    verdict = house.night(nights, rows, notes, hit)
    found = {(alarm.pair.variant, alarm.pair.backend, alarm.metric) for alarm in verdict.alarms}
    assert {each[:2] for each in found} <= {("gguf-Q8_0", "llamacpp")}
    return found


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("nights", [NIGHTS, 20])
def test_a_planted_slow_down_of_ten_percent_is_found_in_the_first_night(nights: int, seed: int) -> None:
    assert ("gguf-Q8_0", "llamacpp", "decode_tok_s") in found_in(nights, seed)


@pytest.mark.parametrize("nights", [1, 3])
def test_with_few_nights_known_a_slow_down_of_one_pair_is_found_nine_times_of_ten(nights: int) -> None:
    assert sum(bool(found_in(nights, seed)) for seed in range(20)) >= 18


@pytest.mark.parametrize("nights", [1, 2, 5])
def test_a_slow_engine_is_found_however_young_the_history(nights: int) -> None:
    for seed in range(10):
        house, rows, notes = after(nights, seed)
        verdict = house.night(nights, rows, notes, lambda v, e: (1 / 1.1 if e == "vllm" else 1.0, 1.0))
        found = {alarm.pair for alarm in verdict.alarms if alarm.metric == "decode_tok_s"}
        assert verdict.word == "regressed" and {pair.backend for pair in found} == {"vllm"}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("nights", [1, 2, NIGHTS])
def test_a_planted_loss_of_one_percent_perplexity_is_found_in_the_first_night(nights: int, seed: int) -> None:
    house, rows, notes = after(nights, seed)
    verdict = house.night(nights, rows, notes, lambda v, e: (1.0, 1.01 if v == "awq-4bit-g128" else 1.0))
    found = {(alarm.pair.variant, alarm.pair.backend) for alarm in verdict.alarms if alarm.metric == "perplexity"}
    assert found == {("awq-4bit-g128", engine) for engine in ENGINES}


def test_a_regression_is_told_every_night_until_it_is_mended() -> None:
    house, rows, notes = after(10, 3)
    slow = lambda v, e: (0.85 if e == "vllm" else 1.0, 1.0)  # noqa: E731
    words = [house.night(10 + night, rows, notes, slow).word for night in range(6)]
    assert words == ["regressed"] * 6
    assert house.night(16, rows, notes).word == "good"


def test_an_accepted_regression_is_the_new_normal() -> None:
    house, rows, notes = after(10, 3)
    slow = lambda v, e: (0.85 if e == "vllm" else 1.0, 1.0)  # noqa: E731
    assert house.night(10, rows, notes, slow).word == "regressed"
    notes.append({**notes[-1], "accepted": True})
    assert house.night(11, rows, notes, slow).word == "good"


def test_a_busy_minute_is_no_regression_but_measured_again() -> None:
    house, rows, notes = after(8, 1)
    before = house.measurements
    busy = iter([0.7])
    plant = lambda v, e: (next(busy, 1.0) if (v, e) == ("base", "vllm") else 1.0, 1.0)  # noqa: E731
    assert house.night(8, rows, notes, plant).word == "good"
    assert house.measurements - before > len(VARIANTS) * len(ENGINES)


def test_what_cannot_be_measured_any_more_is_broken() -> None:
    before = [a_row(), a_row("q"), a_row("never", measured=False, unsupported="no GGUF in vLLM")]
    tonight = [
        replace(a_row(measured=False, error="ImportError: no such symbol"), started_at="2026-11-22T02:00:00Z"),
        replace(a_row("q"), started_at="2026-11-22T02:00:00Z"),
        replace(a_row("never", measured=False, unsupported="no"), started_at="2026-11-22T02:00:00Z"),
        replace(a_row("new", measured=False, error="it never worked"), started_at="2026-11-22T02:00:00Z"),
    ]
    verdict = judge(before, tonight)
    assert verdict.word == "broken" and verdict.compared == 2
    (alarm,) = verdict.alarms
    assert (alarm.pair.variant, alarm.metric, alarm.reason) == ("base", None, "ImportError: no such symbol")
    assert "- base on llamacpp: broken: ImportError: no such symbol\n" in text(verdict, "toy", "desk")


def test_other_tokens_are_not_compared() -> None:
    verdict = judge([a_row()], [a_row(evaluation="e2", windows=[(4, 80.0)], started_at="2026-11-22T02:00:00Z")])
    assert (verdict.word, verdict.compared) == ("first", 0)


def test_rows_stored_by_hand_are_a_level_too() -> None:
    fast = [a_row(key=str(day), started_at=f"2026-11-{day:02}T12:00:00Z") for day in range(1, 6)]
    slow = a_row(step_s=[[0.2, 0.2], [0.1, 0.1], [0.4, 0.4]], started_at="2026-11-22T02:00:00Z")
    verdict = judge(fast, [slow] * TIMES)
    assert [alarm.metric for alarm in verdict.alarms] == ["decode_tok_s"]
    assert "median of 3 against 5 good nights" in verdict.alarms[0].reason


@pytest.mark.parametrize(
    ("metric", "change"), [("prefill_tok_s", 1.07), ("peak_rss_bytes", 1.07), ("disk_bytes", 1.005)]
)
def test_a_night_the_history_and_compare_judge_by_one_size(metric: str, change: float) -> None:
    """Or the issue that a night opens and the page that it points to would disagree."""

    def night(day: int, factor: float) -> Row:
        row = a_row(
            first_token_s=[0.5 * factor, 0.501 * factor, 0.499 * factor] if metric == "prefill_tok_s" else None,
            memory={"peak_rss": int(3e8 * (factor if metric == "peak_rss_bytes" else 1))},
            started_at=f"2026-11-{day:02}T02:00:00Z",
            key=str(day),
        )
        size = int(2e6 * (factor if metric == "disk_bytes" else 1))
        return replace(row, artifact=replace(row.artifact, disk_bytes=size))

    before, after = [night(day, 1.0) for day in range(1, 9)], [night(day, change) for day in range(9, 13)]
    assert [alarm.metric for alarm in judge(before, after[:1] * TIMES).alarms] == [metric]
    (series,) = series_of([*before, *after])
    assert metric in [step.metric for step in steps_of(series) if step.worse]
    (changes,) = compare(before, after).changes.values()
    assert [each.threshold for each in changes] == [JUDGED[each.metric].threshold for each in changes]
    assert metric in [each.metric for each in changes if each.verdict == "worse"]


def test_a_row_that_turns_nan_is_broken() -> None:
    before = [a_row(windows=[(100, 260.0)] * 4), a_row("q", windows=[(100, 260.0)] * 4)]
    bad = losing(before[1], [0, 0, 100, 0])
    at = {"started_at": "2026-11-22T02:00:00Z"}
    verdict = judge(before, [replace(before[0], **at), replace(bad, **at)])
    assert verdict.word == "broken" and not verdict.suspects
    assert "- q on llamacpp: broken: 100 of 400 scored tokens have NaN" in text(verdict, "toy", "desk")
    assert judge([before[0], bad], [replace(before[0], **at), replace(bad, **at)]).word == "good", "as it always was"
