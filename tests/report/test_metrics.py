"""Metrics against values worked out by hand, and the intervals against simulations with a seed."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.rows import a_row
from workbench.records import LoadPoint, Measurement, Request, Row, Serving
from workbench.report import quality, speeds
from workbench.report.metrics import METRICS, OF_THE_REFERENCE


def values(row: Row) -> dict[str, float | None]:
    return {name: metric.value(row) for name, metric in METRICS.items()}


def with_quality(row: Row, windows: list[dict[str, Any]]) -> Row:
    assert row.measurement is not None
    return replace(row, measurement=replace(row.measurement, qualities={"prose": {"windows": windows}}))


def test_every_metric_by_hand() -> None:
    row = a_row(
        first_token_s=[0.5, 0.4, 0.8],
        step_s=[[0.1, 0.3], [0.25, 0.25], [0.5, 0.5]],
        batch=2,
        windows=[(4, 8.0), (6, 13.0)],
        memory={"peak_rss": 1000, "peak_vram": 2000, "weights": 700, "kv_cache": 108, "workspace": 50},
    )
    speed = row.measurement.speeds[0]
    answers = [Request(0.0, 0.0, 5, 0.5, 0.2, [0.3], [1, 1]), Request(0.2, 0.0, 5, 0.8, 0.4, [0.4], [1, 1])]
    served = Serving([LoadPoint("closed", 2.0, answers)], {"ttft": 0.3}, [2.5, 3.5])
    row = replace(
        row,
        machine=replace(row.machine, copy_bytes_per_s=16_000.0),
        measurement=replace(row.measurement, speeds=[replace(speed, energy_j=[12.0, None, 20.0])], serving=served),
    )
    assert values(row) == {
        "bits_per_weight": 16.0,
        "engine_bits_per_weight": pytest.approx(700 * 8 / 1_000_000),
        "disk_bytes": 2_000_000,
        "load_s": 1.5,
        "peak_rss_bytes": 1000,
        "peak_vram_bytes": 2000,
        "prefill_tok_s": pytest.approx(100 * 2 / 0.5),
        "decode_tok_s": pytest.approx(4 / 0.5),
        "weights_bytes": 700,
        "kv_cache_bytes": 108,
        "workspace_bytes": 50,
        "ttft_s": 0.5,
        "itl_p50_s": pytest.approx(0.275),
        "itl_p95_s": pytest.approx(0.5),
        "itl_p99_s": pytest.approx(0.5),
        # Of two requests within a second, one within the limit.
        "goodput_req_s": pytest.approx(1.0),
        "largest_rate_req_s": 2.5,
        "energy_j_per_token": pytest.approx(16 / (speed.new_tokens * 2)),
        # 4 steps a second; of the cache the prompt's part and half of the answer's.
        "bandwidth_fraction": pytest.approx(
            (700 + 108 * (100 + speed.new_tokens / 2) / (100 + speed.new_tokens)) * 4 / 16_000
        ),
        "perplexity": pytest.approx(math.exp(2.1)),
        **dict.fromkeys((*OF_THE_REFERENCE, "kld_predicted", "bits_per_byte")),
    }
    untied = {"weights": 1000, "embedding": 300, "kv_cache": 108}
    assert row.measurement is not None
    apart = replace(row, measurement=replace(row.measurement, memory=untied))
    assert values(apart)["bandwidth_fraction"] == values(row)["bandwidth_fraction"], "one row of it is looked up"
    # Residuals 8 - 2.1 * 4 and 13 - 2.1 * 6 are -0.4 and 0.4; sqrt(2 / 1 * 0.32) / 10 tokens = 0.08.
    assert quality.perplexity_se(row) == pytest.approx(math.exp(2.1) * 0.08)


def test_the_delta_by_hand() -> None:
    base = a_row(windows=[(4, 8.0), (6, 13.0)])
    row = a_row("q", windows=[(4, 9.0), (6, 13.0)])
    delta = quality.perplexity_delta(row, base)
    assert delta is not None
    p, b = math.exp(2.2), math.exp(2.1)
    z = [p * (9 - 8.8) - b * (8 - 8.4), p * (13 - 13.2) - b * (13 - 12.6)]
    assert delta.value == pytest.approx(p - b)
    assert delta.se == pytest.approx(math.sqrt(2 * (z[0] ** 2 + z[1] ** 2)) / 10)


def test_directions_and_order() -> None:
    assert list(METRICS) == [
        "bits_per_weight",
        "engine_bits_per_weight",
        "disk_bytes",
        "load_s",
        "peak_rss_bytes",
        "peak_vram_bytes",
        "weights_bytes",
        "kv_cache_bytes",
        "workspace_bytes",
        "prefill_tok_s",
        "decode_tok_s",
        "ttft_s",
        "itl_p50_s",
        "itl_p95_s",
        "itl_p99_s",
        "goodput_req_s",
        "largest_rate_req_s",
        "energy_j_per_token",
        "bandwidth_fraction",
        "perplexity",
        "kld_mean",
        "kld_predicted",
        "kld_p50",
        "kld_p90",
        "kld_p99",
        "kld_p999",
        "kld_max",
        "top1_agreement",
        "rms_dp",
        "bits_per_byte",
    ]
    higher = {name for name, metric in METRICS.items() if metric.better == "higher"}
    of_servers = {"goodput_req_s", "largest_rate_req_s"}
    assert higher == {"prefill_tok_s", "decode_tok_s", "top1_agreement", "bandwidth_fraction"} | of_servers
    assert all(name == metric.name for name, metric in METRICS.items())


def test_what_types_were_expected_to_cost_is_in_the_artifact() -> None:
    row = a_row()
    for choice, expected in (({"divergence": 0.031}, 0.031), ({}, None), ("a word", None), (None, None)):
        chosen = replace(row, artifact=replace(row.artifact, provenance={"choice": choice}))
        assert values(chosen)["kld_predicted"] == expected


def test_what_was_not_measured_is_none() -> None:
    row = a_row(measured=False)
    assert [name for name, value in values(row).items() if value is not None] == ["bits_per_weight", "disk_bytes"]
    not_made = replace(row, artifact=replace(row.artifact, disk_bytes=0, parameters=0))
    assert set(values(not_made).values()) == {None}
    assert set(values(replace(not_made, measurement=Measurement(device="cpu"))).values()) == {None}
    assert quality.perplexity_se(row) is quality.perplexity_delta(row, row) is quality.nonfinite(row) is None


def test_samples_that_are_no_numbers_are_left_out() -> None:
    assert values(a_row(first_token_s=[], step_s=[]))["prefill_tok_s"] is None


def test_tokens_without_finite_logits_are_counted_and_not_averaged() -> None:
    clean = [{"count": 2, "nonfinite": 0, "nll_sum": 4.0, "nll": [1.0, 3.0]}] * 3
    hurt = [*clean[:2], {"count": 1, "nonfinite": 1, "nll_sum": 2.0, "nll": [None, 2.0]}]
    base, row = with_quality(a_row(), clean), with_quality(a_row("q"), hurt)
    assert quality.nonfinite(row) == 1
    assert values(row)["perplexity"] == pytest.approx(math.exp(10 / 5))
    delta = quality.perplexity_delta(row, base)
    assert delta is not None  # over the five tokens that both have: the base's are 1, 3, 1, 3, 3
    assert delta.value == pytest.approx(math.exp(10 / 5) - math.exp(11 / 5))

    nothing = with_quality(a_row("q"), [{"count": 0, "nonfinite": 2, "nll_sum": 0.0, "nll": [None, None]}] * 3)
    assert values(nothing)["perplexity"] is quality.perplexity_se(nothing) is None
    assert quality.perplexity_delta(nothing, base) is None
    assert quality.nonfinite(nothing) == 6


def test_divergence_and_agreement_by_hand() -> None:
    klds = [[0.25, 0.5], [1.0, None]]
    packed = [struct.pack("<2e", *(math.nan if v is None else v for v in each)) for each in klds]
    windows = [
        {
            "count": 2,
            "nonfinite": 0,
            "nll_sum": 4.0,
            "kld_count": count,
            "kld_sum": total,
            "kld_low_sum": total,
            "same_top_sum": 1,
            "dp_square_sum": square,
            "kld": text,
        }
        for count, total, square, text in ((2, 0.75, 0.08, packed[0]), (1, 1.0, 0.04, packed[1]))
    ]
    row = with_quality(a_row(), windows)
    assert row.evaluation is not None
    row = replace(row, evaluations={"prose": replace(row.evaluation, scored_bytes=16)})
    found = values(row)
    assert [found[f"kld_{name}"] for name in ("p50", "max")] == [0.5, 1.0]
    assert found["kld_p90"] == pytest.approx(0.9) and found["kld_p999"] == pytest.approx(0.999)
    assert found["kld_mean"] == pytest.approx(1.75 / 3)
    assert found["top1_agreement"] == pytest.approx(2 / 3)
    assert found["rms_dp"] == pytest.approx(0.2)
    assert found["bits_per_byte"] == pytest.approx(2.0 / math.log(2) * 4 / 16)
    # Residuals 0.75 - 2 * 1.75 / 3 and 1 - 1.75 / 3 are -5/12 and 5/12.
    error = METRICS["kld_mean"].error
    assert error is not None and error(row) == pytest.approx(math.sqrt(2 * 2 * (5 / 12) ** 2) / 3)
    with_errors = {name for name, metric in METRICS.items() if metric.error}
    assert with_errors == {"perplexity", "kld_mean", "top1_agreement", "rms_dp", "bits_per_byte"}


def test_a_row_whose_base_was_nowhere_finite_was_not_compared() -> None:
    lost = {"kld_count": 0, "kld_sum": 0.0, "kld_low_sum": 0.0, "same_top_sum": 0, "dp_square_sum": 0.0}
    row = with_quality(a_row(), [{"count": 2, "nonfinite": 0, "nll_sum": 4.0} | lost] * 2)
    found = values(row)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert {found[name] for name in OF_THE_REFERENCE} == {None}


def test_no_delta_over_other_tokens() -> None:
    base = a_row()
    assert quality.perplexity_delta(a_row("q"), base) is not None
    assert quality.perplexity_delta(a_row("q", evaluation="e2"), base) is None
    assert quality.perplexity_delta(a_row("q", windows=[(4, 8.0), (4, 10.0)]), base) is None
    assert quality.perplexity_delta(a_row("q", windows=[(4, 8.0), (5, 10.0), (4, 9.0)]), base) is None
    assert quality.perplexity_delta(a_row("q", evaluation=None), base) is None


def test_one_window_has_no_error() -> None:
    base, row = a_row(windows=[(4, 8.0)]), a_row("q", windows=[(4, 9.0)])
    delta = quality.perplexity_delta(row, base)
    assert delta is not None and delta.se is None
    assert delta.value == pytest.approx(math.exp(9 / 4) - math.exp(2))
    assert quality.perplexity_se(row) is None


def test_a_broken_model_has_a_finite_perplexity() -> None:
    value = values(a_row(windows=[(1, 1e6), (1, 2e6)]))["perplexity"]
    assert value is not None and 1e100 < value < math.inf


def test_the_deltas_error_covers_as_often_as_it_claims() -> None:
    """Losses correlated inside a window and between the two models; the truth is known."""
    random = np.random.default_rng(7)
    windows, tokens, trials = 40, 60, 400
    truth = math.exp(2.5) - math.exp(2.4)
    covered = covered_if_unpaired = covered_if_independent = 0
    for _ in range(trials):
        shared = random.normal(0, 0.3, (windows, 1)) + random.normal(0, 1.0, (windows, tokens))
        own = 2.5 + shared + random.normal(0, 0.05, (windows, 1)) + random.normal(0, 0.1, (windows, tokens))
        base_nll = 2.4 + shared
        row = a_row("q", windows=[(tokens, float(total)) for total in own.sum(1)])
        base = a_row(windows=[(tokens, float(total)) for total in base_nll.sum(1)])
        delta = quality.perplexity_delta(row, base)
        assert delta is not None and delta.se is not None
        off = abs(delta.value - truth)
        covered += off <= 2.0227 * delta.se  # Student's t, 39 degrees of freedom
        se, base_se = quality.perplexity_se(row), quality.perplexity_se(base)
        assert se is not None and base_se is not None
        covered_if_unpaired += off <= 2.0227 * math.hypot(se, base_se)
        z = math.exp(own.mean()) * (own - own.mean()) - math.exp(base_nll.mean()) * (base_nll - base_nll.mean())
        covered_if_independent += off <= 1.96 * z.std() / math.sqrt(windows * tokens)
    assert 0.92 <= covered / trials <= 0.98  # 95 % +- 2.7 standard errors of the count
    assert covered_if_unpaired == trials  # far too wide: the pairing is worth something
    assert covered_if_independent / trials < 0.85  # far too narrow: so are the clusters


@pytest.mark.parametrize("repeats", [2, 3, 4, 5, 6, 9, 20, 61])
def test_the_interval_of_a_speed_covers_the_median(repeats: int) -> None:
    random = np.random.default_rng(repeats)
    trials = 3000
    hits = 0
    for sample in 100 * np.exp(random.normal(0, 0.05, (trials, repeats))):
        found = speeds.interval(sample.tolist())
        assert found is not None
        assert found[0] <= np.median(sample) <= found[1]
        hits += found[0] <= 100 <= found[1]
    # Order statistics come in steps, so their coverage is at least 95 %; Student's is 95 %.
    assert 0.938 <= hits / trials <= (0.962 if repeats < 6 else 0.985)


def test_the_ranks_are_those_of_the_tables() -> None:
    # The usual ranks of a median's 95 % interval; of 20, for one, 2 P(Binomial <= 5) = 0.041 and <= 6 gives 0.115.
    ranks = {6: (1, 6), 8: (1, 8), 9: (2, 8), 10: (2, 9), 15: (4, 12), 20: (6, 15), 30: (10, 21), 50: (18, 33)}
    for count, (low, high) in ranks.items():
        assert speeds.interval([float(i) for i in range(count, 0, -1)]) == (low, high)
    assert speeds.interval([float(i) for i in range(1, 5001)]) is not None


def test_too_few_samples_have_no_interval() -> None:
    assert speeds.interval([]) is speeds.interval([3.0]) is None
    assert speeds.interval([5.0, 5.0, 5.0]) == (pytest.approx(5.0), pytest.approx(5.0))
    low, high = speeds.interval([10.0, 11.0]) or (0, 0)
    # Two samples say next to nothing, and the interval says so: exp(mean log +- 12.706 * sd / sqrt 2).
    assert (low, high) == (pytest.approx(5.7244, abs=1e-3), pytest.approx(110 / 5.7244, abs=1e-2))


def test_what_was_made_in_one_go_counts_once() -> None:
    """Three turns of four repeats each: Student's interval of three, not the order statistics of twelve."""
    samples = [10.0, 10.1, 9.9, 10.0, 11.0, 11.1, 10.9, 11.0, 9.0, 9.1, 8.9, 9.0]
    apart = speeds.interval([10.0, 11.0, 9.0])
    together = speeds.interval(samples, [4, 4, 4])
    assert apart and together
    assert together == pytest.approx(apart, rel=1e-3)
    plain = speeds.interval(samples)
    assert plain and together[0] < plain[0] and together[1] > plain[1]
    assert speeds.interval([10.0, 11.0, 9.0], [1, 1, 1]) == speeds.interval([10.0, 11.0, 9.0])
    assert speeds.interval(samples, [12]) == plain, "one turn says nothing of drift"
    assert speeds.interval(samples, [4, 4]) == plain, "a repeat without a time leaves no turns to tell"


def test_an_interval_over_turns_holds_the_median() -> None:
    low, high = speeds.interval([1.0, 1.0, 5.0, 1.0, 1.0, 5.0, 1.0, 1.0, 5.0], [3, 3, 3]) or (0, 0)
    assert low <= 1.0 <= high


def test_an_interval_over_turns_covers_a_drifting_machine() -> None:
    """Repeats of a turn share its drift: 95 % of the intervals hold the truth, and far fewer would without turns."""
    chance = random.Random(3)
    held = naive = 0
    for _ in range(2000):
        drifts = [chance.gauss(0, 0.05) for _ in range(3)]
        samples = [100 * math.exp(drift + chance.gauss(0, 0.01)) for drift in drifts for _ in range(4)]
        for turns in ([4, 4, 4], []):
            low, high = speeds.interval(samples, turns) or (0, 0)
            if turns:
                held += low <= 100 <= high
            else:
                naive += low <= 100 <= high
    assert held >= 0.935 * 2000 > naive
