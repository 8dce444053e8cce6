"""What two rows say next to each other, against numpy, and where they say nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rows import a_row, compared, losing
from workbench.records import Row, Task
from workbench.report import estimates, quality
from workbench.report.metrics import METRICS

CHANCE = np.random.default_rng(3)


def scored(windows: list[dict[str, Any]], reference: str | None = "r1", **more: Any) -> Row:
    row = a_row(**more)
    assert row.measurement is not None
    found = {"windows": windows} | ({"reference_digest": reference} if reference else {})
    return replace(row, measurement=replace(row.measurement, qualities={"prose": found}))  # type: ignore[dict-item]


def drawn(counts: list[int], lost: int = 0) -> list[dict[str, Any]]:
    """Windows with sums of every kind; the first `lost` lack a token that has no finite logits."""
    return [
        {
            "count": n - (place < lost),
            "nonfinite": int(place < lost),
            "nll_sum": float(CHANCE.uniform(2, 3) * n),
            "kld_count": n - (place < lost),
            "kld_sum": float(CHANCE.uniform(0.1, 0.3) * n),
            "kld_low_sum": 0.0,
            "same_top_sum": int(CHANCE.integers(n // 2, n)),
            "dp_square_sum": float(CHANCE.uniform(0.01, 0.02) * n),
        }
        for place, n in enumerate(counts)
    ]


def table(windows: list[dict[str, Any]], name: str) -> Any:
    return np.array([window[name] for window in windows], dtype=float)


def clustered(sums: Any, counts: Any) -> tuple[float, float]:
    """A ratio of two sums over windows, and its linearised error."""
    ratio = sums.sum() / counts.sum()
    n = len(sums)
    return ratio, math.sqrt(n / (n - 1) * ((sums - ratio * counts) ** 2).sum()) / counts.sum()


def test_every_mean_has_the_error_of_windows_of_unequal_size() -> None:
    windows = drawn([30, 50, 40, 80, 20])
    row = scored(windows)
    for name, total in (("kld_mean", "kld_sum"), ("top1_agreement", "same_top_sum")):
        mean, error = clustered(table(windows, total), table(windows, "kld_count"))
        metric = METRICS[name]
        assert metric.error is not None
        assert (metric.value(row), metric.error(row)) == pytest.approx((mean, error))
    square, error = clustered(table(windows, "dp_square_sum"), table(windows, "kld_count"))
    metric = METRICS["rms_dp"]
    assert metric.error is not None
    assert (metric.value(row), metric.error(row)) == pytest.approx((math.sqrt(square), error / (2 * math.sqrt(square))))
    still = estimates.rms_dp({"windows": [window | {"dp_square_sum": 0.0} for window in windows]})  # type: ignore[typeddict-item]
    assert still is not None and (still.value, still.se) == (0.0, 0.0)
    nats, error = clustered(table(windows, "nll_sum"), table(windows, "count"))
    assert quality.perplexity(row) == pytest.approx(math.exp(nats))
    assert quality.perplexity_se(row) == pytest.approx(math.exp(nats) * error)


def test_bits_a_byte_count_the_tokens_left_out_at_the_mean() -> None:
    windows = drawn([30, 50, 40], lost=2)
    row = scored(windows)
    assert row.evaluation is not None
    row = replace(row, evaluations={"prose": replace(row.evaluation, scored_bytes=500)})
    nats, error = clustered(table(windows, "nll_sum"), table(windows, "count"))
    found = quality.bits_per_byte(row)
    assert found is not None
    assert (found.value, found.se) == pytest.approx((nats / math.log(2) * 120 / 500, error / math.log(2) * 120 / 500))
    assert quality.bits_per_byte(scored(windows[:1], evaluation=None)) is None
    one = replace(scored(windows[:1]), evaluations=row.evaluations)
    found = quality.bits_per_byte(one)
    assert found is not None and found.se is None
    assert quality.nonfinite(row) == 2


@pytest.mark.parametrize(("name", "total"), [("kld_mean", "kld_sum"), ("top1_agreement", "same_top_sum")])
def test_the_change_of_a_mean_is_paired_by_window(name: str, total: str) -> None:
    one, two = drawn([30, 50, 40, 80, 20]), drawn([30, 50, 40, 80, 20])
    difference = METRICS[name].difference
    assert difference is not None
    found = difference(scored(one), scored(two))
    assert found is not None
    sides = [(table(windows, total), table(windows, "kld_count")) for windows in (one, two)]
    means = [sums.sum() / counts.sum() for sums, counts in sides]
    z = [(sums - mean * counts) / counts.sum() for (sums, counts), mean in zip(sides, means, strict=True)]
    assert found.value == pytest.approx(means[0] - means[1])
    assert found.se == pytest.approx(math.sqrt(5 / 4 * ((z[0] - z[1]) ** 2).sum()))
    assert found.windows == 5


def test_no_change_of_a_mean_without_one_reference_and_the_same_tokens() -> None:
    difference = METRICS["kld_mean"].difference
    assert difference is not None
    own, other = scored(drawn([30, 50])), scored(drawn([30, 50]))
    assert difference(own, other) is not None
    assert difference(own, scored(drawn([30, 50]), "r2")) is None
    assert difference(own, scored(drawn([30, 51]))) is difference(own, scored(drawn([30, 50, 4]))) is None
    assert difference(own, scored(drawn([30, 50]), evaluation="e2")) is None
    assert difference(a_row(measured=False), own) is difference(own, a_row(measured=False)) is None
    nothing = scored([window | {"kld_count": 0, "same_top_sum": 0, "dp_square_sum": 0.0} for window in drawn([30, 50])])
    assert difference(nothing, own) is difference(own, nothing) is None
    never = scored([{"count": 30, "nonfinite": 0, "nll_sum": 60.0}] * 2, "r1")
    assert difference(never, never) is None
    assert estimates.mean_delta(own.quality, scored(drawn([30])).quality, "kld_sum", "kld_count") is None  # type: ignore[arg-type]


def test_what_was_compared_in_one_window_alone_was_compared() -> None:
    windows = drawn([30, 50])
    windows[0] |= {"kld_count": 0, "kld_sum": 0.0, "same_top_sum": 0, "dp_square_sum": 0.0}
    assert METRICS["kld_mean"].value(scored(windows)) == pytest.approx(windows[1]["kld_sum"] / 50)
    single = drawn([30])
    assert METRICS["kld_mean"].value(scored(single)) == pytest.approx(single[0]["kld_sum"] / 30)
    assert estimates.divergence({"windows": []}) is None  # type: ignore[typeddict-item]


def answered(correct: list[int], digest: str = "t1", name: str = "quiz") -> Row:
    row = a_row()
    assert row.measurement is not None
    tasks = {name: {"correct": correct, "given": [], "warnings": []}}
    row = replace(row, measurement=replace(row.measurement, tasks=tasks))  # type: ignore[arg-type]
    return replace(row, tasks={name: Task(name, "t.json", digest, len(correct), 9)})


def test_accuracies_by_hand() -> None:
    correct, base = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    own, other = answered(correct), answered(base)
    found = quality.task_accuracy(own, "quiz")
    assert found is not None and found.windows == 10
    assert (found.value, found.se) == pytest.approx((0.6, math.sqrt(0.6 * 0.4 / 9)))
    both = quality.task_delta(own, other, "quiz")
    changes = np.subtract(correct, base)
    assert both is not None and both[0].windows == 10 and both[1] == estimates.share_delta_interval(correct, base)
    delta = both[0]
    assert (delta.value, delta.se) == pytest.approx((changes.mean(), changes.std(ddof=1) / math.sqrt(10)))
    assert quality.task_accuracy(own, "other") is None
    with pytest.raises(ValueError):
        estimates.accuracy_delta([1, 0], [1])


def test_no_difference_of_accuracy_over_other_items() -> None:
    own = answered([1, 0])
    assert quality.task_delta(own, answered([1, 0], "t2"), "quiz") is None
    assert quality.task_delta(own, answered([1]), "quiz") is None
    assert quality.task_delta(own, a_row(), "quiz") is quality.task_delta(a_row(), own, "quiz") is None
    assert quality.task_delta(own, answered([1, 0]), "other") is None


def test_the_same_tokens_are_of_one_evaluation_and_of_equal_windows() -> None:
    own = a_row()
    assert quality.same_tokens(own, a_row("q"))
    assert not quality.same_tokens(own, a_row(evaluation="e2"))
    assert not quality.same_tokens(own, a_row(evaluation=None)) and not quality.same_tokens(a_row(evaluation=None), own)
    lost = [{"count": 3, "nonfinite": 1, "nll_sum": 8.0}, *({"count": 4, "nonfinite": 0, "nll_sum": 9.0},) * 2]
    assert quality.same_tokens(own, scored(lost, None)), "a token without a number is a token"
    assert not quality.same_tokens(own, scored([{**lost[0], "nonfinite": 0}, *lost[1:]], None))
    assert not quality.same_tokens(own, a_row(measured=False))


def test_the_reference_is_the_digest_of_what_it_was_compared_with() -> None:
    assert (quality.reference(compared(a_row(), 0.1, "r9")), quality.reference(a_row())) == ("r9", None)
    assert quality.reference(a_row(measured=False)) is None


def test_guessing_is_better_than_a_perplexity_above_the_vocabularys_size() -> None:
    def guessed(perplexity: float, size: int | None) -> int | None:
        row = scored([{"count": 4, "nonfinite": 0, "nll_sum": 4 * math.log(perplexity)}] * 2)
        assert row.quality is not None
        known = {} if size is None else {"vocab_size": size}
        return quality.guessing(
            replace(row, measurement=replace(row.measurement, qualities={"prose": {**row.quality, **known}}))
        )  # type: ignore[type-var, arg-type]

    assert (guessed(501, 500), guessed(499, 500), guessed(501, None)) == (500, None, None)
    assert quality.guessing(a_row(measured=False)) is None


def test_a_divergence_far_from_zero_tells_a_variant_from_its_base_though_the_perplexity_does_not() -> None:
    """As GPTQ on the published rows: 2.3 standard errors of its perplexity, 12 of its divergence."""
    noise = quality.Noise(perplexity=0.01, divergence=1e-3)
    nats = [(400, 900.0), (400, 960.0), (400, 880.0), (400, 930.0)]
    lucky = [(400, 930.0), (400, 932.0), (400, 900.0), (400, 920.0)]
    base, plain = a_row(windows=nats), a_row("q", windows=lucky)
    assert quality.alike(plain, base, noise) is True and not quality.worse(plain, base, noise)
    near, far = compared(base, 2e-4), compared(plain, 0.14)
    assert quality.alike(far, near, noise) is False
    assert quality.worse(far, near, noise) and not quality.worse(near, far, noise)
    # Within what engines make of the base, and from another reference, where the perplexity is all there is.
    assert quality.alike(compared(plain, 1e-3), near, noise) is True
    assert quality.alike(compared(plain, 0.14, reference="r2"), near, noise) is True
    assert quality.alike(a_row(evaluation="e2"), base, noise) is None


def test_a_mean_is_paired_over_what_both_have() -> None:
    """A row whose harder half has become NaN is no better than it was."""
    before = compared(a_row(windows=[(100, 260.0), (100, 270.0), (100, 340.0), (100, 350.0)]), 0.03)
    assert before.quality is not None
    for window, kld in zip(before.quality["windows"], (3.0, 3.2, 5.5, 6.0), strict=True):
        window["kld_sum"] = kld
    after = losing(before, [0, 0, 100, 60])
    found = quality.divergence_delta(after, before)
    assert found is not None and found.value == pytest.approx(0.0, abs=1e-12) and found.windows == 2
    assert quality.lost_tokens(after, [before]) == "160 of 400 scored tokens have NaN or infinite logits"
    assert quality.lost_tokens(losing(before, [0, 0, 100, 80]), [after]) == (
        "180 of 400 scored tokens have NaN or infinite logits (elsewhere 160)"
    )
    assert quality.lost_tokens(before, [after]) is None and quality.lost_tokens(after, [after]) is None
