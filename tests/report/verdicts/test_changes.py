"""What a change is: its interval by an independent Welch, its verdict by the definition, its words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rows import a_row, compared
from workbench.errors import UserError
from workbench.records import Row
from workbench.report.metrics import JUDGED
from workbench.report.verdicts.compare import (
    Change,
    Comparison,
    changes_of,
    compare,
    describe,
    doubts,
    failures,
    objects,
    parse_limit,
    select,
    text,
)

TABLED_T = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 6: 2.44691, 7: 2.36462}
"""Student's t at 97.5 %, from a printed table."""


def timed(rates: Sequence[float], **more: Any) -> Row:
    """A row whose repeats decode at these tok/s (two steps each) and prefill at 200."""
    return a_row(first_token_s=[0.5] * len(rates), step_s=[[1 / rate, 1 / rate] for rate in rates], **more)


def change(old: list[Row], new: list[Row], metric: str = "decode_tok_s", threshold: float | None = None) -> Change:
    (found,) = changes_of(old, new, {metric: JUDGED[metric].threshold if threshold is None else threshold})
    return found


def test_every_metric_has_the_size_that_matters_that_is_documented() -> None:
    assert {name: judged.threshold for name, judged in JUDGED.items()} == {
        "decode_tok_s": 0.05,
        "prefill_tok_s": 0.05,
        "perplexity": 0.005,
        "kld_mean": 0.10,
        "top1_agreement": 0.005,
        "peak_rss_bytes": 0.05,
        "peak_vram_bytes": 0.05,
        "load_s": 0.25,
        "disk_bytes": 0.001,
        "bits_per_weight": 0.001,
    }
    assert list(JUDGED)[:6] == [
        "decode_tok_s",
        "prefill_tok_s",
        "perplexity",
        "kld_mean",
        "top1_agreement",
        "peak_rss_bytes",
    ]
    assert [name for name, judged in JUDGED.items() if judged.exact] == ["disk_bytes", "bits_per_weight"]
    assert [name for name, judged in JUDGED.items() if not judged.nightly] == ["load_s", "bits_per_weight"]
    assert [name for name, judged in JUDGED.items() if judged.plotted] == [
        "decode_tok_s",
        "prefill_tok_s",
        "perplexity",
        "kld_mean",
        "peak_rss_bytes",
        "peak_vram_bytes",
    ]


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (5, 3), (2, 7), (4, 4)])
def test_both_ends_of_the_interval_are_welchs(sizes: tuple[int, int]) -> None:
    chance = np.random.default_rng(sum(sizes))
    for scatter in (0.01, 0.3):
        old, new = 50 * np.exp(chance.normal(0, 0.05, sizes[0])), 40 * np.exp(chance.normal(0, scatter, sizes[1]))
        found = change([timed(old.tolist())], [timed(new.tolist())])
        a, b = np.log(old), np.log(new)
        errors = [side.var(ddof=1) / len(side) for side in (a, b)]
        degrees = sum(errors) ** 2 / sum(e**2 / (n - 1) for e, n in zip(errors, sizes, strict=True))
        half = TABLED_T[max(1, int(degrees))] * math.sqrt(sum(errors))
        center = b.mean() - a.mean()
        assert found.interval == pytest.approx((math.expm1(center - half), math.expm1(center + half)), rel=1e-4)
        assert (found.old, found.new) == pytest.approx((np.median(old), np.median(new)))
        assert found.relative == pytest.approx(np.median(new) / np.median(old) - 1)


def test_what_has_no_interval() -> None:
    assert change([timed([50.0])], [timed([50.0, 51.0])]).interval is None
    assert change([timed([50.0, 51.0])], [timed([50.0])]).interval is None
    same = change([timed([50.0, 50.0])], [timed([55.0, 55.0])])
    assert same.interval == pytest.approx((0.1, 0.1)) and same.verdict == "better"
    wild = change([timed([1e-60, 1e60])], [timed([1.0, 1.0])])
    assert wild.interval is None and wild.verdict == "undecided", "e to the power of 300 is no interval"
    # 299 is: 12.7062 * se of logarithms 2 d apart, se = d, and nothing on the other side.
    d = 299 / 12.7062
    assert change([timed([math.exp(-d), math.exp(d)])], [timed([1.0, 1.0])]).interval is not None


def test_repeats_are_pooled_of_two_runs_and_a_median_each_of_three() -> None:
    runs = [[100.0, 110.0, 90.0], [102.0, 112.0, 95.0], [98.0, 99.0, 97.0]]
    old = [timed(each) for each in runs]
    pooled = change(old[:2], old[:2])
    assert pooled.old == pytest.approx(np.median(runs[0] + runs[1]))
    assert pooled.interval == pytest.approx(change([timed(runs[0] + runs[1])], [timed(runs[0] + runs[1])]).interval)
    assert change(old, old).interval == change([timed([100.0, 102.0, 98.0])], [timed([100.0, 102.0, 98.0])]).interval


GRID = [
    # relative, low, high, threshold 0.05 -> of what is better higher
    (0.10, 0.01, 0.20, "better"),
    (-0.10, -0.20, -0.01, "worse"),
    (0.05, 0.01, 0.09, "better"),
    (-0.05, -0.09, -0.01, "worse"),
    (0.049, 0.01, 0.09, "undecided"),
    (0.049, 0.048, 0.0499, "same"),
    (0.0, -0.0499, 0.0499, "same"),
    (0.0, -0.05, 0.01, "undecided"),
    (0.0, -0.01, 0.05, "undecided"),
    (0.10, 0.0, 0.20, "undecided"),
    (-0.10, -0.20, 0.0, "undecided"),
    (-0.10, -0.20, 0.04, "undecided"),
    (0.10, -0.04, 0.20, "undecided"),
]


@pytest.mark.parametrize(("relative", "low", "high", "verdict"), GRID)
def test_the_verdict_by_the_definition(relative: float, low: float, high: float, verdict: str) -> None:
    from workbench.report.verdicts.compare import _verdict

    turned = {"better": "worse", "worse": "better"}
    assert _verdict(relative, (low, high), 0.05, "higher") == verdict
    assert _verdict(relative, (low, high), 0.05, "lower") == turned.get(verdict, verdict)
    assert _verdict(relative, None, 0.05, "higher") == "undecided"


def test_a_paired_interval_is_of_the_differences_share() -> None:
    """Four windows of 100 tokens: Student's interval of the linearised difference over the old perplexity."""
    old, new = [200.0, 260.0, 180.0, 230.0], [201.0, 262.0, 183.0, 230.5]
    found = change(*([a_row(windows=[(100, nats) for nats in side])] for side in (old, new)), metric="perplexity")
    p, q = (math.exp(sum(side) / 400) for side in (old, new))
    z = [q * (b - sum(new) / 4) - p * (a - sum(old) / 4) for a, b in zip(old, new, strict=True)]
    half = 3.18245 * math.sqrt(4 / 3 * sum(each**2 for each in z)) / 400
    assert found.interval == pytest.approx(((q - p - half) / p, (q - p + half) / p), abs=1e-6)
    assert (found.old, found.new, found.relative) == pytest.approx((p, q, q / p - 1))
    one = change(*([a_row(windows=[(100, side[0])])] for side in (old, new)), metric="perplexity")
    assert one.interval is None and one.verdict == "undecided"


def test_only_the_last_of_several_scored_runs_is_paired() -> None:
    early, late, after = (a_row(windows=[(100, nats)] * 2) for nats in (150.0, 200.0, 201.0))
    assert change([early, late], [early, after], "perplexity").relative == pytest.approx(math.expm1(0.01))


def test_sizes_are_the_last_runs_and_have_no_interval() -> None:
    rows = [replace(a_row(), artifact=replace(a_row().artifact, disk_bytes=size)) for size in (10_000, 10_005, 10_020)]
    assert change(rows[:2], rows[1:2], "disk_bytes").relative == 0.0
    found = change(rows[:1], rows[:2], "disk_bytes")
    assert (found.relative, found.interval, found.verdict) == (pytest.approx(0.0005), None, "same")
    assert change(rows[:1], rows[2:], "disk_bytes").verdict == "worse"
    none = replace(a_row(), artifact=replace(a_row().artifact, disk_bytes=0))
    assert list(changes_of([none], [a_row()], {"disk_bytes": 0.001})) == []
    assert list(changes_of([a_row()], [none], {"disk_bytes": 0.001})) == []


def a_comparison(*changes: Change, lost: str = "") -> Comparison:
    pair = compare([a_row()], [a_row()]).changes.keys().__iter__().__next__()
    return Comparison("desk", {pair: changes}, {pair: lost} if lost else {}, (), (), ("a note",), {pair: "base on x"})


SLOWER = Change("decode_tok_s", 100.0, 90.0, -0.10, (-0.112, -0.088), 0.05, "worse")
LARGER = Change("perplexity", 20.0, 21.0, 0.05, (-0.01, 0.11), 0.005, "undecided")
FASTER = Change("prefill_tok_s", 100.0, 110.0, 0.10, None, 0.05, "undecided")
STILL = Change("load_s", 4.0, 4.0, 0.0, (0.0, 0.0), 0.25, "same")


def test_what_fails_and_what_is_doubted() -> None:
    found = a_comparison(SLOWER, LARGER, FASTER, STILL, lost="it broke")
    everything = dict.fromkeys(JUDGED, 0.05)
    assert failures(found, everything) == [
        "base on x: decode_tok_s -10.00%, limit 5.00%",
        "base on x: no longer measured: it broke",
    ]
    assert failures(found, {"perplexity": 0.005}) == ["base on x: no longer measured: it broke"]
    # Doubts are of what may be worse by the limit or more: a larger perplexity, not a faster prefill.
    assert doubts(found, everything) == [f"base on x: {describe(LARGER)}"]
    assert doubts(found, {"decode_tok_s": 0.05}) == []
    turned = [
        replace(LARGER, relative=-0.05),
        replace(LARGER, relative=0.0049),
        replace(FASTER, relative=-0.05),
        replace(FASTER, relative=-0.0499),
    ]
    assert doubts(a_comparison(*turned), everything) == [f"base on x: {describe(turned[2])}"]
    assert doubts(a_comparison(replace(LARGER, relative=0.005)), everything) != []


def test_the_text_tells_what_moved_and_counts_the_rest() -> None:
    assert describe(SLOWER) == "decode_tok_s 100 tok/s -> 90 tok/s, -10.00 % (95 %: -11.2 to -8.8 %)"
    assert describe(FASTER) == "prefill_tok_s 100 tok/s -> 110 tok/s, +10.00 %"
    found = a_comparison(STILL, LARGER, SLOWER)
    assert text(found).splitlines() == [
        "1 pairs on desk: 1 worse, 0 better, 1 undecided, 1 same",
        "base on x",
        f"  worse     {describe(SLOWER)}",
        "note: a note",
    ]
    assert [line[2:11].strip() for line in text(found, everything=True).splitlines()[2:5]] == [
        "worse",
        "undecided",
        "same",
    ]
    assert text(a_comparison(STILL)).splitlines()[1:] == ["note: a note"]
    assert text(a_comparison(SLOWER, lost="x" * 300)).splitlines()[3] == f"  lost      {'x' * 200}"


def test_the_objects_of_a_comparison() -> None:
    moved, lost = objects(a_comparison(SLOWER, lost="it broke"))
    pair = {"machine": "desk", "base": "Toy-1M", "variant": "base", "backend": "llamacpp", "changed": {}}
    assert moved == pair | {
        "label": "base on x",
        "unit": "tok/s",
        "metric": "decode_tok_s",
        "old": 100.0,
        "new": 90.0,
        "relative": -0.10,
        "interval": (-0.112, -0.088),
        "threshold": 0.05,
        "verdict": "worse",
    }
    assert lost == pair | {"metric": None, "verdict": "lost", "reason": "it broke"}
    json.dumps([moved, lost], allow_nan=False)


def test_which_rows_are_compared() -> None:
    here, there = a_row(), a_row(recipe="other", started_at="2026-11-22T10:00:00Z")
    found = compare([here, there], [here], recipe="toy")
    assert len(found.changes) == 1 and compare([there], [here, there], recipe="other").changes
    with pytest.raises(UserError, match="unknown recipe 'tyo'. Did you mean 'toy'"):
        compare([here], [here], recipe="tyo")
    with pytest.raises(UserError, match="the first set holds no row"):
        compare([here], [there], recipe="other")
    # The beginning of an evaluation's digest names it, that of a machine or a version does not.
    assert compare([a_row(evaluation="e10"), a_row(evaluation="f2")], [a_row(evaluation="e10")], evaluation="e1")
    with pytest.raises(UserError, match="unknown evaluation 'e'"):
        compare([a_row(evaluation="e10")], [a_row(evaluation="e2")], evaluation="e")
    with pytest.raises(UserError, match="unknown machine 'des'"):
        compare([here], [here], machine="des")
    # Rows that were not scored stay beside the chosen evaluation; those of another do not.
    rows = [here, a_row("q", evaluation=None), a_row("r", evaluation="e2")]
    kept = compare(rows, rows, evaluation="e1")
    assert [pair.variant for pair in kept.changes] == ["base", "q"]


def test_rows_are_taken_by_time_whatever_their_order() -> None:
    early, late = (timed([rate] * 2, started_at=f"2026-11-2{day}T10:00:00Z") for rate, day in ((50.0, 1), (99.0, 2)))
    failed = a_row(measured=False, error="it broke", started_at="2026-11-23T10:00:00Z")
    found = compare([late, early], [failed, late])
    assert list(found.lost) == [] and len(found.changes) == 1
    assert compare([early], [replace(failed, error=None, unsupported="no such engine")]).lost.popitem()[1] == (
        "no such engine"
    )
    assert compare([early], [replace(failed, error=None)]).lost.popitem()[1] == "it was not measured"
    assert compare([failed], [failed]).lost == {} and compare([failed], [early]).changes == {}


def test_two_references_are_told_once_they_are_two() -> None:
    one, two = compared(a_row(), 0.1, "r1"), compared(a_row(), 0.1, "r2")
    assert compare([one], [one]).notes == compare([one], [a_row()]).notes == compare([a_row()], [one]).notes == ()
    (note,) = compare([one], [two]).notes
    assert note == "base on llamacpp: divergences are from two references of the base and not compared"
    assert compare([two, one], [replace(one, started_at="2026-12-01T00:00:00Z")]).notes == ()


@pytest.mark.parametrize("given", ["decode_tok_s:5.5.%", "decode_tok_s:5%x", "decode_tok_s 5%", "decode_tok_s:.5%"])
def test_limits_are_whole_percentages(given: str) -> None:
    with pytest.raises(UserError, match="--fail"):
        parse_limit(given)
    assert parse_limit("decode_tok_s: 12.5 %") == ("decode_tok_s", 0.125)


def test_dates_and_commits_that_select() -> None:
    rows = [
        a_row(
            key=str(n), started_at=f"2026-11-{n:02}T02:00:00Z", versions={"commit": f"{n:02}cafe0000" if n % 2 else ""}
        )
        for n in range(1, 12)
    ]
    assert [row.key for row in select(rows, "2026-11-03T02:00:00Z")] == ["3"]
    assert [row.key for row in select(rows, "03cafe0000-dirty")] == ["3"]
    with pytest.raises(UserError, match=r"The latest dates: 2026-11-04, (.*, ){6}2026-11-11$"):
        select(rows, "2026-12")
    with pytest.raises(UserError, match=r"no row of that commit. The latest commits: 01cafe0000, .*11cafe0000$"):
        select(rows, "beef")
    with pytest.raises(UserError, match="The latest commits: none"):
        select(rows[1:2], "beef")
