"""The choice and the front against brute force over every pair, limits at their edges, and what is told of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.rows import a_row, compared
from workbench.records import Row
from workbench.report import estimates, quality
from workbench.report.table import Line, build
from workbench.report.verdicts.recommend import (
    Candidate,
    Constraints,
    Recommendation,
    objects,
    parse_share,
    recommend,
)

MIB = 2**20
NATS = [900.0, 960.0, 880.0, 930.0]


def made(
    variant: str,
    tok_s: float = 50.0,
    nats: Sequence[float] | float = 0.0,
    mib: float = 300,
    disk_mib: float = 200,
    scatter: float = 0.002,
    **more: Any,
) -> Row:
    """A variant that decodes at `tok_s`, more or less by `scatter`, and costs `nats` more than the base a window."""
    extra = [nats] * 4 if isinstance(nats, float | int) else nats
    row = a_row(
        variant,
        windows=[(400, total + one) for total, one in zip(NATS, extra, strict=True)],
        step_s=[[1 / rate] * 2 for rate in (tok_s * (1 - scatter), tok_s, tok_s * (1 + scatter))],
        memory={"peak_rss": mib * MIB},
        **more,
    )
    return replace(row, artifact=replace(row.artifact, disk_bytes=int(disk_mib * MIB)))


def ask(rows: list[Row], **limits: Any) -> Recommendation:
    return recommend(build(rows), Constraints(**limits))


def doubts(one: Candidate | None) -> list[str]:
    return [doubt.words for doubt in one.doubts] if one else []


def chosen(rows: list[Row], **limits: Any) -> str | None:
    found = ask(rows, **limits).choice
    return found and found.line.row.artifact.variant


ORDER = ("quality", "speed", "memory", "size")
TOLERANCE = {"quality": 0.005, "speed": 0.05, "memory": 0.01, "size": 0.01}


def spread(rows: list[Row]) -> float:
    """What engines alone make of the base's perplexity."""
    every = [quality.perplexity(row) or 0.0 for row in rows if row.artifact.variant == "base"]
    return max(every) - min(every)


def sure(by: str, line: Line) -> float:
    """What is sure of a line, smaller is better: the rule of the module's docstring."""
    if by == "speed":
        return -(line.intervals["decode_tok_s"] or (0, 0))[0]
    if by == "quality":
        assert line.delta is not None and line.values["perplexity"]
        return line.values["perplexity"] - line.delta.value + (estimates.interval(line.delta) or (0, 0))[1]
    return line.values[{"memory": "peak_rss_bytes", "size": "disk_bytes"}[by]] or 0.0


def behind(by: str, one: Line, other: Line, engines: float) -> bool:
    a, b = sure(by, one), sure(by, other)
    return a > b + max(abs(b) * TOLERANCE[by], engines if by == "quality" else 0.0)


def decisive(by: str, one: Line, other: Line, engines: float) -> bool:
    """Whether a test finds one worse than the other."""
    if by == "quality":
        difference = quality.perplexity_delta(one.row, other.row)
        assert difference is not None
        return difference.value > engines and (estimates.interval(difference) or (0, 0))[0] > 0
    if by == "speed":
        return (one.intervals["decode_tok_s"] or (0, 0))[1] < (other.intervals["decode_tok_s"] or (0, 0))[0]
    return behind(by, one, other, engines)


@pytest.mark.parametrize("sort", ORDER)
def test_the_choice_its_ties_and_the_front_are_those_of_the_rule(sort: str) -> None:
    chance = random.Random(sort)
    choices, tied, fronts = set(), 0, 0
    for _ in range(25):
        rows = [made("base", 50, mib=800, disk_mib=400)]
        if chance.random() < 0.7:
            rows.append(made("base", 40, chance.uniform(0, 2), mib=900, disk_mib=400, backend="vllm"))
        for name in "abcdef":
            common = chance.choice([0.0, 0.3, 2.0, 10.0])
            nats = [common + chance.gauss(0, chance.choice([0.1, 1.0])) for _ in NATS]
            memory, disk = 300 * chance.choice([1, 1.005, 1.2]), 200 * chance.choice([1, 1.008, 1.3])
            speed, scatter = 50 * chance.choice([1, 1.01, 1.2]), chance.choice([0.001, 0.02, 0.5])
            rows.append(made(name, speed, nats, memory, disk, scatter))
        engines, table = spread(rows), build(rows)
        found = recommend(table, Constraints(sort=sort))
        assert found.choice is not None
        choice, lines = found.choice.line, list(table.lines)
        best = min(lines, key=lambda line: sure(sort, line))
        near = [line for line in lines if not behind(sort, line, best, engines)]
        alike = [line for line in near if not any(decisive(sort, line, other, engines) for other in lines)] or near
        assert any(choice is line for line in alike)
        by_name = {one.name: one.line for one in found.fitting}
        assert {id(by_name[name]) for name in found.tied} == {id(line) for line in alike if line is not choice}

        def dominated(line: Line, lines: list[Line] = lines, engines: float = engines) -> bool:
            return any(
                any(behind(by, line, other, engines) for by in ORDER)
                and not any(behind(by, other, line, engines) for by in ORDER)
                for other in lines
            )

        assert {id(one.line) for one in found.front} == {id(line) for line in lines if not dominated(line)}
        assert [one.line for one in found.fitting] == sorted(lines, key=lambda line: sure(sort, line))
        assert found.runner_up is not None and found.runner_up.line is not choice
        # That a speed was measured badly helps nobody.
        worse = chance.choice([row for row in rows if row is not choice.row])
        widened = widen(worse)
        again = recommend(build([widened if row is worse else row for row in rows]), Constraints(sort=sort)).choice
        assert again is not None and again.line.row is not widened
        choices.add(choice.row.artifact.variant)
        tied += len(found.tied)
        fronts += len(found.front) < len(lines)
    assert len(choices) > 1 and tied > 0 and fronts > 0, "or the test shows nothing"


def widen(row: Row) -> Row:
    """The row with a tenth and ten times its rate beside it."""
    assert row.measurement is not None
    (speed,) = row.measurement.speeds
    steps = [[each * factor for each in speed.step_s[1]] for factor in (10, 1, 0.1)]
    return replace(row, measurement=replace(row.measurement, speeds=[replace(speed, step_s=steps)]))


def test_sizes_and_memories_within_a_hundredth_are_alike() -> None:
    small, large = made("small", nats=5, mib=100, disk_mib=100), made("large", mib=101, disk_mib=101)
    assert chosen([small, large], sort="memory") == chosen([small, large], sort="size") == "large"
    more = made("large", mib=101.1, disk_mib=101.1)
    assert chosen([small, more], sort="memory") == chosen([small, more], sort="size") == "small"


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("memory_bytes", 300 * MIB, "memory 300 MiB, at most 300 MiB"),
        ("size_bytes", 200 * MIB, "size 200 MiB, at most 200 MiB"),
        ("max_perplexity_value", math.exp(3680 / 1600), "perplexity 9.974, at most 9.974"),
    ],
)
def test_a_limit_is_kept_by_what_equals_it_and_failed_by_what_is_over(limit: str, value: float, words: str) -> None:
    row = made("q", nats=2.5)
    assert chosen([row], **{limit: value * (1 + 1e-9)}) == "q"
    if limit != "max_perplexity_value":  # whose last digit is rounding
        assert chosen([row], **{limit: value}) == "q"
    found = ask([row], **{limit: value * (1 - 1e-6)})
    assert found.choice is None and found.rejected == {"q on llamacpp": (words,)}


def test_a_relative_limit_is_of_the_base_and_gives_way_by_what_engines_make() -> None:
    """Engines 0.1 % apart: 1.05 % more than the base is over a limit of 1 % by less, 1.2 % by more."""

    def costing(more: float) -> list[float]:
        return [920 + 400 * math.log1p(more) - total for total in NATS]  # alike in every window

    engines = [made("base", nats=costing(0)), made("base", nats=costing(0.001), backend="vllm")]

    def of(more: float) -> Recommendation:
        return ask([*engines, made("q", 90, costing(more))], max_perplexity=0.01, backend="llamacpp")

    inside, noise, over = of(0.0099), of(0.0105), of(0.012)
    assert inside.choice and inside.choice.line.row.artifact.variant == "q" and inside.choice.doubts == ()
    assert noise.choice and noise.choice.line.row.artifact.variant == "base", "which surely keeps it"
    assert noise.hope and doubts(noise.hope) == ["perplexity +1.05% (+1.05% to +1.05%), at most +1.00%"]
    assert over.rejected == {"q on llamacpp": ("perplexity +1.20%, at most +1.00%",)}
    # A better one than the base passes any such limit.
    assert ask([*engines, made("q", 90, costing(-0.01))], max_perplexity=0.0).choice is not None


def test_few_windows_leave_a_relative_limit_open() -> None:
    row = made("q", 90, [30.0, -28.0, 20.0, -10.0])
    found = ask([made("base"), row], max_perplexity=0.01)
    assert found.choice is not None and found.choice.line.row.artifact.variant == "base"
    assert found.runner_up is not None and found.runner_up is found.hope and found.why == "limits"
    line = found.runner_up.line
    assert line.delta is not None and line.values["perplexity"] is not None
    base = line.values["perplexity"] - line.delta.value
    low, high = estimates.interval(line.delta) or (0, 0)
    words = f"perplexity +0.75% ({low / base:+.2%} to {high / base:+.2%}), at most +1.00%"
    assert doubts(found.runner_up) == [words] and found.runner_up.doubts[0].likely
    assert low < 0 and chosen([made("base"), row], max_perplexity=high / base + 0.001) == "q"


def test_a_divergence_gives_way_by_its_error() -> None:
    row = compared(made("q"), 0.1)
    assert row.measurement is not None and row.quality is not None
    windows = [
        window | {"kld_sum": total}
        for window, total in zip(row.quality["windows"], (39.0, 41.0, 40.0, 40.0), strict=True)
    ]
    qualities = {"prose": {**row.quality, "windows": windows}}
    row = replace(row, measurement=replace(row.measurement, qualities=qualities))  # type: ignore[arg-type]
    error = math.sqrt(4 / 3 * 2) / 1600  # of the mean 0.1: residuals -1, 1, 0, 0
    reach = estimates.t_quantile(0.975, 3) * error  # of four windows 3.18 errors, where 1.96 would be too few
    ends = f"({0.1 - reach:.4f} to {0.1 + reach:.4f})"
    sure, likely = ask([row], max_kld=0.1 + 1.01 * reach).choice, ask([row], max_kld=0.1 + 0.99 * reach).choice
    assert sure and likely and (sure.standing, likely.standing) == (0, 1)
    close = ask([row], max_kld=0.1 - 0.99 * reach).choice
    assert close and close.standing == 2 and doubts(close) == [f"divergence 0.1000 nat {ends}, at most 0.0968 nat"]
    assert ask([row], max_kld={"prose": 0.1 - 1.01 * reach}).rejected == {
        "q on llamacpp": (f"divergence on prose 0.1000 nat {ends}, at most 0.0967 nat",)
    }


def test_a_divergence_of_one_window_has_no_error_to_give_way_by() -> None:
    row = compared(a_row("q", windows=[(400, 900.0)]), 0.1)
    assert ask([row], max_kld=0.1).choice is not None and ask([row], max_kld=0.099).choice is None


def test_speeds_that_are_the_same_to_the_last_digit_are_the_same() -> None:
    fast, good = made("fast", nats=5, scatter=0.0), made("good", nats=1, scatter=0.0)
    assert chosen([fast, good]) == chosen([good, fast]) == "good"


@pytest.mark.parametrize("limit", ["min_decode_tok_s", "min_prefill_tok_s"])
def test_a_speed_gives_way_by_its_interval(limit: str) -> None:
    name = limit.removeprefix("min_")
    row = made("q", 100.0, scatter=0.01)
    row = replace(row, measurement=replace(row.measurement, speeds=[  # type: ignore[type-var]
        replace(row.measurement.speeds[0], first_token_s=[1 / 0.99, 1.0, 1 / 1.01])  # type: ignore[union-attr]
    ]))  # fmt: skip
    table = build([row])
    low, high = table.lines[0].intervals[name] or (0, 0)
    assert low < 100 < high
    what = name.removesuffix("_tok_s")
    found = [ask([row], **{limit: value}).choice for value in (low * 0.9999, 100.0, high * 0.9999)]
    assert [one and one.standing for one in found] == [0, 1, 2]
    assert doubts(found[2]) == [f"{what} 100.0 tok/s ({low:.1f} to {high:.1f}), at least {high * 0.9999:.1f} tok/s"]
    failed = ask([row], **{limit: high * 1.0001})
    why = f"{what} 100.0 tok/s ({low:.1f} to {high:.1f}), at least {high * 1.0001:.1f} tok/s"
    assert failed.rejected == {"q on llamacpp": (why,)}
    assert ask([a_row("q", step_s=[[0.01, 0.01]], first_token_s=[1.0])], **{limit: 101.0}).choice is None
    nothing = ask([a_row("q", step_s=[], first_token_s=[])], **{limit: 1.0})
    assert nothing.rejected == {"q on llamacpp": (f"{what} was not measured",)}


def test_a_perplexity_without_the_bases_is_not_called_unmeasured() -> None:
    why = "perplexity beside the base's was not measured"
    assert ask([made("q", 100.0)], max_perplexity=0.03).rejected == {"q on llamacpp": (why,)}
    assert ask([a_row("q", evaluation=None)], max_perplexity=0.03).rejected == {
        "q on llamacpp": ("perplexity was not measured",)
    }


def test_what_was_not_measured_is_worse_than_what_was() -> None:
    timed, still = made("timed", 1.0, nats=9), replace(made("still"), key="s")
    still = replace(still, measurement=replace(still.measurement, speeds=[]))  # type: ignore[type-var]
    for rows in ([timed, still], [still, timed]):
        assert chosen(rows, sort="speed") == "timed" and chosen(rows, sort="quality") == "still"
    assert [one.line.row.artifact.variant for one in ask([made("base"), timed, still]).front] == ["base"]


def test_a_device_of_its_own_has_the_memory_that_counts() -> None:
    row = a_row("q", memory={"peak_rss": 5000 * MIB, "peak_vram": 900 * MIB})
    assert objects(ask([row]))["choice"]["memory_bytes"] == 5000 * MIB  # type: ignore[index]
    row = replace(row, measurement=replace(row.measurement, device="NVIDIA H100"))  # type: ignore[type-var]
    assert objects(ask([row]))["choice"]["memory_bytes"] == 900 * MIB  # type: ignore[index]


@pytest.mark.parametrize("memory", [{"peak_rss": 5 * MIB, "peak_vram": 0}, {"peak_rss": 5 * MIB}])
def test_where_a_gpu_s_memory_is_unknown_the_host_s_does_not_stand_for_it(memory: dict[str, int]) -> None:
    row = a_row("q", memory=memory)
    row = replace(row, measurement=replace(row.measurement, device="NVIDIA H100"))  # type: ignore[type-var]
    assert objects(ask([row]))["choice"]["memory_bytes"] is None  # type: ignore[index]
    failed = ask([row], memory_bytes=900 * MIB)
    assert failed.choice is None and failed.rejected == {"q on llamacpp": ("memory on the GPU was not measured",)}
    known = a_row("known", memory={"peak_rss": 9 * MIB})
    best = ask([row, known], sort="memory").choice
    assert best and best.name == "known on llamacpp", "what is unknown is not the least"


def test_bases_of_their_own_are_compared_by_perplexity_alone() -> None:
    rows = [made("base"), made("a", nats=0.2), made("other", nats=0.1, base="Other-2M", method="base")]
    assert chosen(rows, sort="quality") in ("base", "a")
    for name in ("Another-2M", "Xother-2M"):
        rows = [made("base"), made("other", nats=[-5.0, 4.8, 5.0, -5.0], base=name, method="base")]
        found = ask(rows, sort="quality")
        assert found.choice is not None and found.choice.line.row.base == name


@pytest.mark.parametrize(("given", "pair"), [("0.5 %", (0.005, None)), ("100%", (1.0, None)), (" 7 ", (None, 7.0))])
def test_shares_and_values(given: str, pair: tuple[float | None, float | None]) -> None:
    assert parse_share(given, "--max-perplexity") == pair
