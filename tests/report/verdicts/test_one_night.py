"""One night's decisions against the rule in numpy, at its edges, and what is remembered of a night."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rows import a_row, compared
from workbench.records import Row
from workbench.report.metrics import JUDGED
from workbench.report.selection import pair_of
from workbench.report.verdicts.night import (
    TIMES,
    WATCHED,
    Alarm,
    NightVerdict,
    good_nights,
    judge,
    note_of,
    text,
)

TONIGHT = "2026-12-24T02:00:00Z"


def timed(rate: float, day: int = 0, variant: str = "base", **more: Any) -> Row:
    """A row that decodes at a rate in each of three repeats, of a day in November or of tonight."""
    at = f"2026-11-{day:02}T02:00:00Z" if day else TONIGHT
    return a_row(variant, step_s=[[1 / rate, 1 / rate]] * 3, started_at=at, **more)


def scored(nats: float, day: int = 0, **more: Any) -> Row:
    at = f"2026-11-{day:02}T02:00:00Z" if day else TONIGHT
    return a_row(windows=[(100, nats), (100, nats + 1)], started_at=at, **more)


def alarmed(before: Sequence[Row], tonight: Sequence[Row]) -> list[str | None]:
    return [alarm.metric for alarm in judge(before, tonight).alarms]


def test_a_night_watches_what_has_a_size_that_matters() -> None:
    assert {
        name: judged.threshold for name, judged in JUDGED.items() if name not in ("load_s", "bits_per_weight")
    } == WATCHED
    assert WATCHED["decode_tok_s"] == 0.05 and WATCHED["perplexity"] == 0.005


def spread(values: Sequence[float]) -> float:
    logs = np.log(values)
    return float(1.4826 * np.median(np.abs(logs - np.median(logs))))


def test_alarms_are_those_of_the_rule() -> None:
    """Worse than the median of up to seven nights by 5 %, and by three standard errors of such a difference."""
    chance = np.random.default_rng(5)
    alarms = 0
    for trial in range(80):
        nights = int(chance.integers(4, 10))
        scatter = chance.uniform(0.0, 0.04, 3)
        levels = {
            variant: (60 * np.exp(chance.normal(0, sigma, nights))).tolist()
            for variant, sigma in zip("abc", scatter, strict=True)
        }
        times = int(chance.integers(TIMES, TIMES + 2)) if trial % 2 else TIMES
        slower = {variant: 1 - chance.uniform(0.0, 0.25) for variant in "abc"}
        before = [timed(rates[n], n + 1, variant) for variant, rates in levels.items() for n in range(nights)]
        tonight = [timed(60 * slower[variant], 0, variant) for variant in "abc" for _ in range(times)]
        kept = {variant: rates[-7:] for variant, rates in levels.items()}
        usual = float(np.median([spread(rates) for rates in kept.values()]))
        expected = set()
        for variant, rates in kept.items():
            change = math.log(float(np.median(rates)) / (60 * slower[variant]))
            noise = math.sqrt((spread(rates) ** 2 + usual**2) / 2)
            if change >= math.log(1.05) and change >= 3 * noise * math.sqrt(1 / 2 + math.pi / 2 / len(rates)):
                expected.add(variant)
        assert {alarm.pair.variant for alarm in judge(before, tonight).alarms} == expected
        alarms += len(expected)
    assert 60 < alarms < 200, "both answers must be common, or the test shows nothing"


def test_the_first_measurement_of_a_night_errs_more_than_two() -> None:
    """Alone it makes a suspect by three of its own errors, sqrt(1 + pi / 2 / 4) of the spread, and no alarm yet."""
    rates = [54.0, 60.0, 60.0, 66.0]
    before = [timed(rate, day) for day, rate in enumerate(rates, 1)]
    error = spread(rates) * math.sqrt(1 + math.pi / 2 / 4)
    for factor, suspects in ((0.98, 0), (1.02, 1)):
        verdict = judge(before, [timed(60 * math.exp(-3 * error * factor))])
        assert (len(verdict.suspects), verdict.alarms) == (suspects, ())
    two = judge(before, [timed(40.0)] * 2)
    assert len(two.suspects) == 1 and two.word == "good", "it gets three measurements"
    assert judge(before, [timed(40.0)] * 3).suspects == ()


@pytest.mark.parametrize(("slower", "found"), [(1 / 1.0502, True), (1 / 1.0497, False)])
def test_what_matters_is_a_twentieth(slower: float, found: bool) -> None:
    before = [timed(60.0, day) for day in range(1, 6)]
    assert alarmed(before, [timed(60 * slower)] * TIMES) == (["decode_tok_s"] if found else [])
    assert alarmed(before, [timed(60 / slower)] * TIMES) == []


@pytest.mark.parametrize("nights", [1, 3, 4])
def test_more_perplexity_is_worse_and_less_is_not(nights: int) -> None:
    before = [scored(300.0, day) for day in range(1, nights + 1)]
    assert alarmed(before, [scored(300.55)] * TIMES) == ["perplexity"]
    assert alarmed(before, [scored(300.45)] * TIMES) == []
    assert alarmed(before, [scored(290.0)] * TIMES) == []


def test_with_few_nights_a_speed_must_fail_the_test_on_its_repeats() -> None:
    def rates(*each: float, day: int = 0) -> Row:
        at = f"2026-11-{day:02}T02:00:00Z" if day else TONIGHT
        return a_row(step_s=[[1 / rate, 1 / rate] for rate in each], started_at=at)

    noisy = [rates(40.0, 60.0, 90.0, day=1)]
    assert alarmed(noisy, [rates(50.0, 52.0, 51.0)] * TIMES) == []
    assert alarmed([rates(60.0, 60.5, 59.5, day=1)], [rates(50.0, 52.0, 51.0)] * TIMES) == ["decode_tok_s"]
    # From four nights on the nights themselves tell, whatever the repeats do.
    four = [rates(40.0, 60.0, 90.0, day=day) for day in (1, 2, 3, 4)]
    assert alarmed(four, [rates(50.0, 52.0, 51.0)] * TIMES) == ["decode_tok_s"]
    apart = [timed(rate, day) for day, rate in enumerate((60.0, 80.0, 45.0), 1)]
    assert alarmed(apart, [timed(50.0)] * TIMES) == []


def test_the_reason_has_the_numbers() -> None:
    before = [timed(60.0, day) for day in range(1, 6)]
    (alarm,) = judge(before, [timed(50.0), timed(48.0), timed(45.0)]).alarms
    assert alarm.reason == ("decode_tok_s 60 tok/s -> 48 tok/s (-20.0 %, limit 5 %, median of 3 against 5 good nights)")
    assert alarm.label == "base on llamacpp"
    verdict = judge(before, [timed(50.0), timed(48.0), timed(45.0)])
    assert text(verdict, "toy", "desk") == (
        "toy on desk: regressed, 1 pairs compared with the good nights before.\n\n"
        f"llamacpp, 1 alarm; no version changed with it\n\n- base on llamacpp: {alarm.reason}\n"
    )
    long = NightVerdict((replace(alarm, metric=None, reason="y" * 500),), (), 1)
    assert text(long, "toy", "desk").splitlines()[4] == "- base on llamacpp: broken: " + "y" * (400 - len("broken: "))


def test_a_night_in_one_word() -> None:
    worse, lost = Alarm(pair_of(a_row()), "load_s", ""), Alarm(pair_of(a_row()), None, "")
    assert NightVerdict((), (), 0).word == "first"
    assert NightVerdict((), (), 1).word == "good"
    assert NightVerdict((worse,), (), 1).word == "regressed"
    assert NightVerdict((worse, lost), (), 1).word == "broken"


def test_divergences_are_compared_with_nights_of_their_own_reference() -> None:
    def night(kld: float, reference: str, day: int = 0) -> Row:
        at = f"2026-11-{day:02}T02:00:00Z" if day else TONIGHT
        return compared(a_row(started_at=at), kld, reference)

    before = [night(0.01, "r1", day) for day in range(1, 6)] + [night(0.05, "r2", day) for day in range(6, 9)]
    assert alarmed(before, [night(0.05, "r2")] * TIMES) == []
    assert alarmed(before, [night(0.06, "r2")] * TIMES) == ["kld_mean"]
    assert alarmed(before, [night(0.05, "r3")] * TIMES) == []
    assert alarmed(before[:5], [night(0.05, "r1")] * TIMES) == ["kld_mean"]


def test_nights_of_another_version_or_evaluation_are_no_level() -> None:
    before = [timed(60.0, day) for day in range(1, 6)]
    slow = timed(50.0)
    assert judge(before, [replace(slow, measurement_version=99)] * TIMES).word == "first"
    assert (
        judge([replace(row, measurement_version=99) for row in before[:2]] + before[2:], [slow] * TIMES)
        .alarms[0]
        .reason.endswith("against 3 good nights)")
    )


def note(since: str, until: str, alarms: list[Row] = [], **more: Any) -> Any:  # noqa: B006
    return {
        "recipe": "toy",
        "since": since,
        "until": until,
        "alarmed": [(row.artifact.variant, row.backend) for row in alarms],
    } | more


def test_nights_are_told_by_their_notes_and_days() -> None:
    def at(moment: str, variant: str = "base", **more: Any) -> Row:
        return a_row(variant, started_at=moment, **more)

    # One night over midnight, with its ends; two rows stored by hand on one day; a row that was not measured.
    rows = [
        at("2026-11-01T23:00:00Z"),
        at("2026-11-02T01:00:00Z"),
        at("2026-11-02T02:00:00Z"),
        at("2026-11-02T12:00:00Z"),
        at("2026-11-02T13:00:00Z"),
        at("2026-11-03T01:00:00Z", measured=False, error="no"),
        at("2026-11-03T01:00:00Z", "q"),
    ]
    night = note("2026-11-01T23:00:00Z", "2026-11-02T02:00:00Z")
    found = good_nights(rows, [night])
    (base,), (q,) = ([nights for pair, nights in found.items() if pair.variant == v] for v in ("base", "q"))
    assert [[row.started_at for row in each] for each in base] == [
        [row.started_at for row in rows[:3]],
        [row.started_at for row in rows[3:5]],
    ]
    assert len(q) == 1
    # Of a night with an alarm the others count; once it was accepted, its own rows and what came later.
    hurt = note("2026-11-01T23:00:00Z", "2026-11-02T02:00:00Z", [rows[0]])
    assert [len(n) for n in good_nights(rows, [hurt]).values()] == [1, 1]
    assert [len(n) for n in good_nights([*rows, at("2026-11-02T00:30:00Z", "q")], [hurt]).values()] == [1, 2]
    accepted = [hurt, hurt | {"accepted": True}]
    early = at("2026-11-01T22:59:59Z")
    (kept,) = (nights for pair, nights in good_nights([early, *rows], accepted).items() if pair.variant == "base")
    assert [len(night) for night in kept] == [3, 2], "rows of before the accepted night are no level any more"
    days = [at(f"2026-11-{day:02}T12:00:00Z") for day in range(20, 5, -1)]
    (last,) = good_nights(days, []).values()
    assert [night[0].started_at[8:10] for night in last] == ["14", "15", "16", "17", "18", "19", "20"]


def test_what_is_remembered_of_a_night() -> None:
    verdict = judge([timed(60.0, day) for day in range(1, 6)], [timed(50.0)] * TIMES)
    kept = note_of("toy", "a", "b", verdict)
    assert kept == {
        "recipe": "toy",
        "since": "a",
        "until": "b",
        "verdict": "regressed",
        "alarmed": [("base", "llamacpp")],
        "alarms": [verdict.alarms[0].reason],
    }


def test_what_could_never_be_measured_is_not_broken_and_what_could_is() -> None:
    failed = replace(timed(1.0, variant="q"), measurement=None, error=None, unsupported=None)
    verdict = judge([timed(60.0, 1, "q")], [failed])
    assert [(alarm.metric, alarm.reason) for alarm in verdict.alarms] == [(None, "it was not measured")]
    assert judge([replace(failed, started_at="2026-11-01T00:00:00Z")], [failed]).word == "first"
    # A later measurement of the night counts, whatever failed before it.
    assert judge([timed(60.0, 1, "q")], [failed, timed(60.0, 0, "q")]).word == "good"
