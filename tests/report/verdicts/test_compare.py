"""Better, worse, same, undecided: by a test on raw samples and a threshold of size; and what is not compared."""

from __future__ import annotations

import json
import math
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tests.rows import a_row, losing
from workbench.errors import UserError
from workbench.records import Row
from workbench.report import store
from workbench.report.verdicts.compare import Change, Verdict, compare, failures, json_text, parse_limit, select, text


def timed(decode: list[float], **more: Any) -> Row:
    """A row whose repeats decode at these tok/s (two steps each) and prefill at 200."""
    return a_row(first_token_s=[0.5] * len(decode), step_s=[[1 / rate, 1 / rate] for rate in decode], **more)


def change(old: Row | list[Row], new: Row | list[Row], metric: str = "decode_tok_s", **more: Any) -> Change:
    sides = [rows if isinstance(rows, list) else [rows] for rows in (old, new)]
    (changes,) = compare(sides[0], sides[1], **more).changes.values()
    return next(change for change in changes if change.metric == metric)


STEADY = [100.0, 101.0, 99.5]


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([90.0, 90.5, 89.5], "worse"),
        ([110.0, 111.0, 109.5], "better"),
        ([100.2, 100.9, 99.6], "same"),
        ([98.0, 98.5, 97.5], "same"),  # distinct, but smaller than what matters
        ([110.0, 80.0, 95.0], "undecided"),
        ([90.0], "undecided"),  # one sample proves nothing
    ],
)
def test_speed_by_interval_and_threshold(new: list[float], verdict: Verdict) -> None:
    assert change(timed(STEADY), timed(new)).verdict == verdict


def test_the_interval_is_welchs() -> None:
    """Against numbers worked out by hand from the formula, for logarithms 0, 1, 2 and 10, 11, 12."""
    old, new = timed([math.exp(x) for x in (0, 1, 2)]), timed([math.exp(x) for x in (10, 11, 12)])
    low, high = change(old, new).interval or (0, 0)
    # difference 10, variance 1 on both sides, so se = sqrt(2/3) and 4 degrees of freedom: t = 2.776
    assert math.log1p(low) == pytest.approx(10 - 2.776 * math.sqrt(2 / 3), rel=1e-3)
    assert math.log1p(high) == pytest.approx(10 + 2.776 * math.sqrt(2 / 3), rel=1e-3)


def test_false_alarms_are_as_rare_as_the_test_says() -> None:
    chance = random.Random(7)
    verdicts = []
    for _ in range(400):
        old, new = ([math.exp(chance.gauss(4, 0.02)) for _ in range(5)] for _ in range(2))
        verdicts.append(change(timed(old), timed(new), thresholds={"decode_tok_s": 1e-9}).verdict)
    assert 5 <= sum(verdict in ("better", "worse") for verdict in verdicts) <= 36  # 5 % of 400 is 20


def test_a_threshold_of_ones_own() -> None:
    old, new = timed(STEADY), timed([98.0, 98.5, 97.5])
    assert change(old, new, thresholds={"decode_tok_s": 0.01}).verdict == "worse"


def test_three_runs_a_side_count_as_runs() -> None:
    """Repeats agree within a process; processes differ. Pooled repeats would call that a difference."""

    def runs(speeds: list[float], day: int) -> list[Row]:
        return [
            timed([s, s * 1.001, s * 0.999], started_at=f"2026-11-{day + i:02}T00:00:00Z") for i, s in enumerate(speeds)
        ]

    assert change(runs([100, 120, 80], 1), runs([95, 112, 76], 11)).verdict == "undecided"
    assert change(runs([100, 101, 99], 1), runs([90, 91, 89], 11)).verdict == "worse"


def scored(nats: list[float], **more: Any) -> Row:
    return a_row(windows=[(100, total) for total in nats], **more)


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        ([1.0, 1.01, 0.99, 1.0], "worse"),  # 1 % in every window, though windows themselves differ by far more
        ([-1.0, -1.01, -0.99, -1.0], "better"),
        ([0.1, 0.1, 0.1, 0.1], "same"),
        ([4.0, 0.0, -1.0, 1.0], "undecided"),
    ],
)
def test_perplexity_is_paired_over_windows(shift: list[float], verdict: Verdict) -> None:
    old = [200.0, 260.0, 180.0, 230.0]
    found = change(scored(old), scored([a + b for a, b in zip(old, shift, strict=True)]), "perplexity")
    assert found.verdict == verdict
    assert found.relative == pytest.approx(math.expm1(sum(shift) / 400))


def compared(row: Row, klds: list[float], reference: str = "r1") -> Row:
    assert row.measurement is not None and row.quality is not None
    windows = [
        window
        | {
            "kld_count": window["count"],
            "kld_sum": kld * window["count"],
            "kld_low_sum": 0.0,
            "same_top_sum": window["count"] * (1 - kld),
            "dp_square_sum": 0.0,
        }
        for window, kld in zip(row.quality["windows"], klds, strict=True)
    ]
    quality = {"windows": windows, "reference_digest": reference}
    return replace(row, measurement=replace(row.measurement, qualities={"prose": quality}))


def test_divergence_is_paired_and_of_one_reference() -> None:
    old = compared(a_row(), [0.1, 0.2, 0.3])
    assert change(old, compared(a_row(), [0.12, 0.24, 0.36]), "kld_mean").verdict == "undecided"
    assert change(old, compared(a_row(), [0.15, 0.251, 0.351]), "kld_mean").verdict == "worse"
    assert change(old, compared(a_row(), [0.15, 0.251, 0.351]), "top1_agreement").verdict == "worse"
    other = compare([old], [compared(a_row(), [0.1, 0.2, 0.3], "r2")])
    ((changes),) = other.changes.values()
    assert "kld_mean" not in {each.metric for each in changes}
    assert "two references" in other.notes[0]


def test_one_figure_a_run_needs_two_runs() -> None:
    def run(mib: int, second: int) -> Row:
        return a_row(memory={"peak_rss": mib * 2**20}, started_at=f"2026-11-21T10:00:{second:02}Z")

    assert change(run(300, 0), run(400, 1), "peak_rss_bytes").verdict == "undecided"
    old, new = [run(300, 0), run(301, 1)], [run(400, 2), run(401, 3)]
    assert change(old, new, "peak_rss_bytes").verdict == "worse"
    assert change(old, [run(299, 2), run(302, 3)], "peak_rss_bytes").verdict in ("same", "undecided")


def test_sizes_are_exact() -> None:
    old = a_row("q")
    larger = replace(old, artifact=replace(old.artifact, disk_bytes=2_010_000))
    assert change(old, larger, "disk_bytes").verdict == "worse"
    assert change(old, old, "disk_bytes").verdict == "same"


def test_pairs_lost_and_new() -> None:
    old = [a_row(), a_row("q"), a_row("gone"), a_row("never", measured=False, unsupported="no")]
    new = [a_row(), a_row("q", measured=False, error="ValueError: it broke"), a_row("added")]
    found = compare(old, new)
    assert [pair.variant for pair in found.changes] == ["base"]
    assert {pair.variant: why for pair, why in found.lost.items()} == {"q": "ValueError: it broke"}
    assert ([p.variant for p in found.only_old], [p.variant for p in found.only_new]) == (["gone", "never"], ["added"])
    told = text(found)
    assert "1 lost" in told and "q on llamacpp\n  lost      ValueError: it broke" in told
    assert failures(found, {"decode_tok_s": 0.05}) == ["q on llamacpp: no longer measured: ValueError: it broke"]
    assert failures(found, {}) == []


def test_what_is_not_comparable_is_refused_unless_told_which() -> None:
    here, there = a_row(), a_row(machine="lab")
    with pytest.raises(UserError, match="nothing to compare: the second set"):
        compare([here], [there], machine="desk")
    for chosen in ("desk", "lab"):
        assert compare([here, there], [here, there], machine=chosen).machine == chosen
    with pytest.raises(UserError, match="unknown machine 'dusk'. Did you mean 'desk'"):
        compare([here], [here], machine="dusk")
    with pytest.raises(UserError, match=r"2 evaluations \(e1, e2\).*--evaluation"):
        compare([here], [a_row(evaluation="e2")])
    assert compare([here, a_row(evaluation="e2")], [here], evaluation="e1").changes
    with pytest.raises(UserError, match=r"2 measurement versions \(2, 3\).*--measurement-version"):
        compare([here], [a_row(measurement_version=3)])
    assert compare([here], [here, a_row(measurement_version=3)], measurement_version=2).changes
    assert compare([here], [here, a_row("q", evaluation=None)]).only_new  # not scored is no other evaluation
    with pytest.raises(UserError, match="the first set holds no row"):
        compare([], [here])


def test_quality_and_size_are_compared_across_machines_and_nothing_else() -> None:
    here, there = scored([200.0, 210.0, 190.0]), scored([202.0, 212.1, 191.9], machine="lab")
    found = compare([here], [there])
    ((pair, changes),) = found.changes.items()
    assert {change.metric: change.verdict for change in changes} == {
        "perplexity": "worse",
        "disk_bytes": "same",
        "bits_per_weight": "same",
    }
    told = text(found)
    assert told.startswith("1 pairs on desk, lab: 1 worse")
    assert "note: the rows are of 2 machines (desk, lab): only quality and size are compared" in told
    assert len(compare([here, there], [here], machine="desk").changes[pair]) > 3
    with pytest.raises(UserError, match=r"2 machines \(desk, lab\), whose decode_tok_s cannot be .*--machine"):
        compare([here], [there], thresholds={"decode_tok_s": 0.05, "perplexity": 0.01})


def test_limits_are_parsed() -> None:
    assert parse_limit("decode_tok_s:5%") == ("decode_tok_s", 0.05)
    assert parse_limit("perplexity:0.5%") == ("perplexity", 0.005)


@pytest.mark.parametrize("given", ["decode:5%", "decode_tok_s", "decode_tok_s:5", "decode_tok_s:-5%", "decode_tok_s:"])
def test_bad_limits_are_told(given: str) -> None:
    with pytest.raises(UserError, match="--fail"):
        parse_limit(given)


def test_dates_and_commits_select() -> None:
    rows = [
        a_row(key=str(day), started_at=f"2026-11-{day:02}T02:00:00Z", versions={"commit": f"{day:02}cafe123456"})
        for day in (1, 2, 3)
    ]
    assert [row.key for row in select(rows, "2026-11-02")] == ["2"]
    assert len(select(rows, "2026-11")) == 3
    assert [row.key for row in select(rows, "03cafe")] == ["3"]
    assert [row.key for row in select(rows, "03cafe1234567890")] == ["3"]
    with pytest.raises(UserError, match=r"2026-12-01: no row of that date. The latest dates: .*2026-11-03"):
        select(rows, "2026-12-01")
    with pytest.raises(UserError, match="no row of that commit"):
        select(rows, "beef1")
    with pytest.raises(UserError, match="neither a file, nor a date"):
        select(rows, "yesterday")


def test_two_variants_are_compared_engine_by_engine(tmp_path: Path) -> None:
    rows = [
        scored([199.0, 209.0, 189.0]),
        scored([200.0, 210.0, 190.0], variant="Q5", started_at="2026-11-22T10:00:00Z"),
        scored([202.0, 212.1, 191.9], variant="Q4"),
        scored([200.0, 210.0, 190.0], variant="Q5", backend="vllm"),
    ]
    for row in rows:
        store.append(tmp_path, "desk", row)
    done = command("compare", "Q5", "Q4", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 pairs on desk: 1 worse, ")
    assert "Q5 -> Q4 on llamacpp\n  worse     perplexity " in done.stdout and "(95 %: +" in done.stdout
    assert "only in the first: Q5 -> Q4 on vllm\n" in done.stdout
    back = command("compare", "Q4", "Q5", "--results", str(tmp_path), "--fail", "perplexity:0.5%")
    assert back.returncode == 0 and "better    perplexity" in back.stdout
    assert command("compare", "Q5", "Q4", "--results", str(tmp_path), "--fail", "perplexity:0.5%").returncode == 1
    typo = command("compare", "Q5", "Q6", "--results", str(tmp_path))
    assert typo.returncode == 2 and "unknown variant 'Q6'. Known: Q4, Q5, base." in typo.stderr


def test_pairs_that_differ_only_in_an_option_say_so() -> None:
    old = [timed(STEADY, options={"kv_cache": kv, "threads": 2}, key=kv) for kv in ("f16", "q8_0")]
    new = [timed([80.0, 80.5, 79.5], options={"kv_cache": "q8_0", "threads": 2})]
    found = compare(old, new)
    assert list(found.labels.values()) == ["base on llamacpp (kv_cache f16)", "base on llamacpp (kv_cache q8_0)"]
    told = text(found)
    assert "base on llamacpp (kv_cache q8_0)\n  worse" in told
    assert "only in the first: base on llamacpp (kv_cache f16)" in told
    # An option that older rows did not have, and that says nothing, makes no other pair.
    assert compare([timed(STEADY)], [timed(STEADY, options={"new": None})]).changes


def test_names_from_files_cannot_steer_a_terminal() -> None:
    rows = [timed(STEADY, variant="\x1b[2Jq")], [timed([80.0, 80.5, 79.5], variant="\x1b[2Jq")]
    told = text(compare(*rows), everything=True)
    assert "\x1b" not in told and "decode_tok_s 100 tok/s -> 80 tok/s, -20.00 %" in told
    assert json.loads(json_text(compare(*rows)))[0]["verdict"] == "worse"


def test_the_command(tmp_path: Path) -> None:
    old, new = timed(STEADY), timed([90.0, 90.5, 89.5], started_at="2026-11-22T10:00:00Z")
    for row in (old, new):
        store.append(tmp_path / "all", "desk", row)
    store.append(tmp_path / "a", "desk", old)
    store.append(tmp_path / "b", "desk", new)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return command("compare", *words)

    done = run(str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.returncode == 0 and "worse     decode_tok_s 100 tok/s -> 90 tok/s, -10.00 %" in done.stdout, done
    dates = run("2026-11-21", "2026-11-22", "--results", str(tmp_path / "all"))
    assert dates.stdout == done.stdout
    failed = run(str(tmp_path / "a"), str(tmp_path / "b"), "--fail", "decode_tok_s:5%", "--fail", "perplexity:0.5%")
    assert failed.returncode == 1 and "decode_tok_s -10.00%, limit 5.00%" in failed.stderr
    assert run(str(tmp_path / "a"), str(tmp_path / "b"), "--fail", "decode_tok_s:15%").returncode == 0
    assert run(str(tmp_path / "a"), str(tmp_path / "b"), "--fail", "prefill_tok_s:1%").returncode == 0
    store.append(tmp_path / "c", "desk", timed([80.0], started_at="2026-11-23T10:00:00Z"))
    few = run(str(tmp_path / "a"), str(tmp_path / "c"), "--fail", "decode_tok_s:5%")
    assert few.returncode == 0 and "undecided, measure more: base on llamacpp: decode_tok_s 100" in few.stderr
    typo = run(str(tmp_path / "a"), str(tmp_path / "b"), "--fail", "decode_toks:1%")
    assert typo.returncode == 2 and "Did you mean 'decode_tok_s'" in typo.stderr
    empty = run(str(tmp_path / "a"), str(tmp_path))
    assert empty.returncode == 2 and "the second set holds no row" in empty.stderr
    nothing = run("2026-11-21", "2026-11-22", "--results", str(tmp_path / "nowhere"))
    assert nothing.returncode == 2 and "nothing measured yet" in nothing.stderr


def test_a_row_that_turns_nan_is_lost() -> None:
    """Its other numbers are of the tokens that are left, and may look as good as ever."""
    old = a_row(windows=[(100, 260.0)] * 4)
    new = losing(replace(old, started_at="2026-11-22T10:00:00Z"), [0, 0, 100, 0])
    found = compare([old], [new])
    assert [*found.lost.values()] == ["100 of 400 scored tokens have NaN or infinite logits"]
    assert failures(found, {"perplexity": 0.01}) == [
        "base on llamacpp: no longer measured: 100 of 400 scored tokens have NaN or infinite logits"
    ]
    assert not compare([new], [replace(new, started_at="2026-11-23T10:00:00Z")]).lost, "as it was before"
    assert not compare([new], [replace(old, started_at="2026-11-23T10:00:00Z")]).lost, "mended"
