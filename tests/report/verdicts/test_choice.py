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
from workbench.report.table import Line, Table, build
from workbench.report.verdicts.recommend import (
    ORDERS,
    Constraints,
    Recommendation,
    objects,
    parse_share,
    recommend,
    text,
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


def chosen(rows: list[Row], **limits: Any) -> str | None:
    found = ask(rows, **limits).choice
    return found and found.line.row.artifact.variant


def floor_of(table: Table) -> float:
    every = [one.values["perplexity"] for one in table.lines if one.row.artifact.variant == "base"]
    known = [value for value in every if value is not None]
    return max(known) - min(known) if len(known) > 1 else 0.0


def worse(by: str, one: Line, other: Line, floor: float) -> bool:
    """The rule of the module's docstring."""
    if by == "speed":
        a, b = one.intervals["decode_tok_s"], other.intervals["decode_tok_s"]
        assert a and b
        return a[1] < b[0]
    if by == "quality":
        difference = quality.perplexity_delta(one.row, other.row)
        assert difference is not None
        ends = estimates.interval(difference)
        assert ends is not None
        return difference.value > floor and ends[0] > 0
    name = {"memory": "peak_rss_bytes", "size": "disk_bytes"}[by]
    a, b = one.values[name], other.values[name]
    assert a and b
    return a > 1.01 * b


def rank(by: str, line: Line) -> float:
    found = {
        "speed": line.values["decode_tok_s"],
        "quality": line.values["perplexity"],
        "memory": line.values["peak_rss_bytes"],
        "size": line.values["disk_bytes"],
    }[by]
    assert found
    return -found if by == "speed" else found


@pytest.mark.parametrize("sort", list(ORDERS))
def test_the_choice_and_the_front_are_those_of_the_rule(sort: str) -> None:
    chance = random.Random(sort)
    order = [sort, *(by for by in ("quality", "speed", "memory", "size") if by != sort)]
    if sort == "memory":
        order = ["memory", "quality", "speed", "size"]
    choices, tied = set(), 0
    for _ in range(15):
        rows = [made("base", 50, mib=800, disk_mib=400)]
        if chance.random() < 0.7:
            rows.append(made("base", 40, chance.uniform(0, 2), mib=900, disk_mib=400, backend="vllm"))
        for name in "abcdef":
            common = chance.choice([0.0, 0.3, 2.0, 10.0])
            nats = [common + chance.gauss(0, chance.choice([0.1, 1.0])) for _ in NATS]
            memory, disk = 300 * chance.choice([1, 1.005, 1.2]), 200 * chance.choice([1, 1.008, 1.3])
            rows.append(
                made(name, 50 * chance.choice([1, 1.01, 1.2]), nats, memory, disk, chance.choice([0.001, 0.02]))
            )
        table = build(rows)
        found = recommend(table, Constraints(sort=sort))
        floor = floor_of(table)
        pool = list(table.lines)
        for place, by in enumerate(order):
            best = min(pool, key=lambda line, by=by: rank(by, line))  # type: ignore[misc]
            pool = [line for line in pool if not worse(by, line, best, floor)]
            if place == 0:
                alike = {id(line) for line in pool}
        last = min(pool, key=lambda line: [rank(by, line) for by in order])
        assert found.choice is not None and found.choice.line is last
        assert set(found.tied) == {one.name for one in found.fitting if id(one.line) in alike} - {found.choice.name}
        front = [
            line
            for line in table.lines
            if not any(
                any(worse(by, line, other, floor) for by in order)
                and not any(worse(by, other, line, floor) for by in order)
                for other in table.lines
            )
        ]
        assert [one.line for one in found.front] == sorted(front, key=lambda line: rank(sort, line))
        assert [one.line for one in found.fitting] == sorted(table.lines, key=lambda line: rank(sort, line))
        choices.add(last.row.artifact.variant)
        tied += len(found.tied)
    assert len(choices) > 1 and tied > 0, "or the test shows nothing"


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
    assert noise.choice and noise.choice.doubts == ("perplexity +1.05% is over +1.00%, but by no more than noise",)
    assert over.rejected == {"q on llamacpp": ("perplexity +1.20%, at most +1.00%",)}
    # A better one than the base passes any such limit.
    assert ask([*engines, made("q", 90, costing(-0.01))], max_perplexity=0.0).choice is not None


def test_few_windows_leave_a_relative_limit_open() -> None:
    row = made("q", 90, [30.0, -28.0, 20.0, -10.0])
    found = ask([made("base"), row], max_perplexity=0.01)
    assert found.choice is not None
    line = found.choice.line
    assert line.delta is not None and line.values["perplexity"] is not None
    base = line.values["perplexity"] - line.delta.value
    low, high = estimates.interval(line.delta) or (0, 0)
    words = f"{low / base:+.2%} to {high / base:+.2%} of the base's (95 %)"
    assert found.choice.doubts == (f"too few windows to be sure of 1.00%: perplexity {words}",)
    assert low < 0 and ask([made("base"), row], max_perplexity=high / base + 0.001).choice.doubts == ()  # type: ignore[union-attr]


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
    assert ask([row], max_kld=0.1).choice is not None
    close = ask([row], max_kld=0.1 - 1.95 * error)
    assert close.choice is not None and close.choice.doubts == (
        "divergence 0.1000 nat is over 0.0980 nat, but by no more than noise",
    )
    assert ask([row], max_kld=0.1 - 1.97 * error).rejected == {
        "q on llamacpp": ("divergence 0.1000 nat, at most 0.0980 nat",)
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
    assert ask([row], **{limit: 100.0}).choice.doubts == ()  # type: ignore[union-attr]
    assert ask([row], **{limit: high * 0.9999}).choice.doubts == (  # type: ignore[union-attr]
        f"{what} 100.0 tok/s is under {high * 0.9999:g}, but by no more than noise",
    )
    failed = ask([row], **{limit: high * 1.0001})
    assert failed.rejected == {"q on llamacpp": (f"{what} 100.0 tok/s, at least {high * 1.0001:g}",)}
    assert ask([a_row("q", step_s=[[0.01, 0.01]], first_token_s=[1.0])], **{limit: 101.0}).choice is None
    nothing = ask([a_row("q", step_s=[], first_token_s=[])], **{limit: 1.0})
    assert nothing.rejected == {"q on llamacpp": (f"{what} was not measured",)}


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
    row = replace(row, measurement=replace(row.measurement, memory={"peak_rss": 5 * MIB, "peak_vram": 0}))  # type: ignore[type-var]
    assert objects(ask([row]))["choice"]["memory_bytes"] == 5 * MIB  # type: ignore[index]


def test_bases_of_their_own_are_compared_by_perplexity_alone() -> None:
    rows = [made("base"), made("a", nats=0.2), made("other", nats=0.1, base="Other-2M", method="base")]
    assert chosen(rows, sort="quality") in ("base", "a")
    rows = [made("base"), made("other", nats=-0.1, base="Other-2M", method="base")]
    assert chosen(rows, sort="quality") == "other"


def test_the_text_and_the_objects_have_the_numbers() -> None:
    rows = [made("base"), made("q", 90, 4.0, 150, 100), made("awq", measured=False, error="x" * 400)]
    found = recommend(build(rows), Constraints(), lambda row: f"serve {row.artifact.path}")
    told = text(found).splitlines()
    more, perplexity = math.expm1(0.01), math.exp(3670 / 1600)
    numbers = f"90.0 tok/s, perplexity {perplexity * (1 + more):.3f} ({more:+.2%}), 150 MiB memory, 100 MiB on disk"
    assert told == [
        "Pareto front (quality, speed, memory, size), by speed:",
        f"  {'q on llamacpp':40} {numbers}",
        f"  {'base on llamacpp':40} 50.0 tok/s, perplexity {perplexity:.3f}, 300 MiB memory, 200 MiB on disk",
        "",
        "Rejected:",
        f"  {'awq on llamacpp':40} {('failed: ' + 'x' * 400)[:300]}",
        "",
        "Choice: q on llamacpp",
        f"  {numbers}",
        "",
        "Serve it with:",
        "  serve q.gguf",
    ]
    record = objects(found)
    assert record["command"] == "serve q.gguf" and record["tied"] == []
    assert record["choice"] == {
        "variant": "q",
        "backend": "llamacpp",
        "base": "Toy-1M",
        "path": "q.gguf",
        "decode_tok_s": pytest.approx(90),
        "prefill_tok_s": pytest.approx(200),
        "perplexity": pytest.approx(perplexity * (1 + more)),
        "perplexity_delta": pytest.approx(perplexity * more),
        "memory_bytes": 150 * MIB,
        "disk_bytes": 100 * MIB,
        "doubts": [],
    }
    nothing = text(ask([made("base")], memory_bytes=1))
    assert nothing.endswith("Nothing fits. The limits above say by how much.\n")


def test_what_is_tied_and_within_the_noise_is_told_so() -> None:
    rows = [made("base"), made("base", nats=5.0, backend="vllm"), made("q", nats=2.0)]
    told = text(ask(rows, sort="quality"))
    assert "(~+0.50%)" in told
    assert "  by quality alone not to be told from: " in told


@pytest.mark.parametrize(("given", "pair"), [("0.5 %", (0.005, None)), ("100%", (1.0, None)), (" 7 ", (None, 7.0))])
def test_shares_and_values(given: str, pair: tuple[float | None, float | None]) -> None:
    assert parse_share(given, "--max-perplexity") == pair
