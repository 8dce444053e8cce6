"""The estimators against closed forms, and the intervals against what they claim."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from workbench.report import estimates as statistics


def quality(nlls, klds=None, tops=None, dps=None):
    """A quality dictionary of per-window lists, None for an excluded token."""
    windows = []
    for i, nll in enumerate(nlls):
        finite = [v for v in nll if v is not None]
        window = {
            "count": len(finite),
            "nonfinite": len(nll) - len(finite),
            "nll_sum": sum(finite),
            "nll": nll,
        }
        if klds is not None:
            kept = [v for v in klds[i] if v is not None]
            window |= {
                "kld": klds[i],
                "kld_count": len(kept),
                "kld_sum": sum(kept),
                "kld_low_sum": 0.95 * sum(kept),
                "same_top_sum": sum(tops[i]),
                "dp_square_sum": sum(d * d for d in dps[i]),
            }
        windows.append(window)
    return {"windows": windows}


def correlated(rng, windows, tokens, spread=0.4):
    """Per-window nll: a level shared by the window, and noise; and a variant's, which shares both but for a
    little."""
    base, variant = [], []
    for _ in range(windows):
        level, extra = rng.gauss(2.5, spread), rng.gauss(0.05, 0.03)
        base.append([max(0.0, level + rng.gauss(0, 1.0)) for _ in range(tokens)])
        variant.append([max(0.0, x + extra + rng.gauss(0, 0.15)) for x in base[-1]])
    return base, variant


def test_perplexity_of_equal_tokens():
    found = statistics.perplexity(quality([[math.log(7.0)] * 5] * 4))
    assert found.value == pytest.approx(7.0)
    assert found.se == pytest.approx(0.0, abs=1e-12)
    assert found.windows == 4


def test_clustered_error_by_hand():
    # Two windows of two tokens with means 1 and 3: R = 2, residuals -2 and 2, Var = 2 * 8 / 16 = 1.
    found = statistics.perplexity(quality([[1.0, 1.0], [3.0, 3.0]]))
    assert found.value == pytest.approx(math.exp(2))
    assert found.se == pytest.approx(math.exp(2) * 1.0)


def test_a_broken_model_still_makes_json():
    broken = quality([[2000.0, 3000.0], [2500.0, 100.0]])
    assert math.isfinite(statistics.perplexity(broken).se)
    assert math.isfinite(statistics.perplexity_delta(broken, quality([[1.0, 2.0], [1.0, 2.0]])).se)


def test_one_window_has_no_error():
    assert statistics.perplexity(quality([[1.0, 2.0]])).se is None
    assert statistics.interval(statistics.perplexity(quality([[1.0, 2.0]]))) is None


def test_error_of_the_difference_is_that_of_the_linearised_difference():
    rng = random.Random(3)
    base, variant = correlated(rng, 60, 40)
    q, base_q = quality(variant), quality(base)
    delta = statistics.perplexity_delta(q, base_q)
    assert delta.value == pytest.approx(statistics.perplexity(q).value - statistics.perplexity(base_q).value)
    assert delta.se < 0.2 * statistics.perplexity(q).se
    # Against the jackknife over windows, which linearises nothing.
    left_out = []
    for i in range(60):
        rest = [quality(side[:i] + side[i + 1 :]) for side in (variant, base)]
        left_out.append(statistics.perplexity(rest[0]).value - statistics.perplexity(rest[1]).value)
    mean = sum(left_out) / 60
    jackknife = math.sqrt(59 / 60 * sum((x - mean) ** 2 for x in left_out))
    assert delta.se == pytest.approx(jackknife, rel=0.05)


def test_the_same_model_differs_by_nothing():
    base, _ = correlated(random.Random(1), 5, 10)
    delta = statistics.perplexity_delta(quality(base), quality(base))
    assert (delta.value, delta.se) == (0.0, 0.0)


def test_pairs_only_tokens_finite_in_both():
    delta = statistics.perplexity_delta(
        quality([[1.0, None, 2.0], [1.0, 1.0, 1.0]]), quality([[1.0, 9.0, 2.0], [1.0, 1.0, None]])
    )
    assert delta.value == pytest.approx(0.0)
    bare = quality([[1.0, None], [2.0, 2.0], [3.0, 3.0]])
    for window in bare["windows"]:
        del window["nll"]
    without = statistics.perplexity_delta(bare, quality([[5.0, 5.0], [2.0, 2.0], [3.0, 3.0]]))
    assert (without.value, without.windows) == (0.0, 2)


def test_refuses_other_evaluations():
    with pytest.raises(ValueError, match="not the same evaluation"):
        statistics.perplexity_delta(quality([[1.0]]), quality([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="window 0.*not the same evaluation"):
        statistics.perplexity_delta(quality([[1.0]]), quality([[1.0, 2.0]]))


def test_every_statistic_by_hand():
    klds = [[i / 1000 for i in range(1, 501)], [i / 1000 for i in range(501, 1001)]]
    tops = [[1] * 400 + [0] * 100, [1] * 500]
    dps = [[0.03] * 500, [-0.04] * 500]
    q = quality([[1.0] * 500, [2.0] * 500], klds, tops, dps)
    assert statistics.divergence(q).value == pytest.approx(0.5005)
    quantiles = [statistics.divergence_quantile(q, p) for p in (0.5, 0.99, 0.999, 1.0)]
    assert quantiles == [pytest.approx(0.5005), pytest.approx(0.99001), pytest.approx(0.999001), 1.0]
    assert statistics.agreement(q).value == pytest.approx(0.9)
    assert statistics.agreement(q).se == pytest.approx(0.1)
    assert statistics.rms_dp(q).value == pytest.approx(math.sqrt((0.0009 + 0.0016) / 2))
    assert statistics.bits_per_byte(q, 4000).value == pytest.approx(1.5 * 1000 / 4000 / math.log(2))
    assert statistics.nonfinite(q) == 0
    change = statistics.mean_delta(q, quality([[1.0] * 500, [1.9] * 500]), "nll_sum", "count")
    assert change.value == pytest.approx(0.05) and change.se == pytest.approx(0.05)
    for found in (statistics.divergence(q), statistics.rms_dp(q), statistics.bits_per_byte(q, 4000)):
        assert math.isfinite(found.se) and found.windows == 2


def test_without_a_reference_there_is_no_divergence():
    q = quality([[1.0], [2.0]])
    assert statistics.divergence(q) is statistics.agreement(q) is statistics.rms_dp(q) is None
    assert statistics.divergence_quantile(q, 0.5) is None


def test_nothing_finite_says_nothing():
    nothing = quality([[None, None], [None, None]])
    assert statistics.nonfinite(nothing) == 4
    for statistic in (statistics.perplexity, lambda q: statistics.bits_per_byte(q, 10)):
        with pytest.raises(ValueError, match="no scored token"):
            statistic(nothing)
    with pytest.raises(ValueError, match="no scored token"):
        statistics.perplexity_delta(nothing, quality([[1.0, 1.0], [1.0, 1.0]]))


@pytest.mark.parametrize("p", [0.6, 0.95, 0.975, 0.995])
def test_t_quantile_leaves_the_share_that_it_says(p):
    """The density integrated by Simpson's rule, with t = sqrt(v) tan(x), which makes it cos(x)^(v - 1)."""
    for degrees in (1, 2, 3, 4, 5, 9, 19, 100, 10_000):
        end, steps = math.atan(statistics.t_quantile(p, degrees) / math.sqrt(degrees)), 2000
        heights = [math.cos(end * i / steps) ** (degrees - 1) for i in range(steps + 1)]
        area = end / steps / 3 * (heights[0] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
        scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
        assert 0.5 + math.exp(scale) * area == pytest.approx(p, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "degrees", "tabled"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.975, 9, 2.262), (0.995, 4, 4.604)],
)
def test_t_quantile_is_the_table_s(p, degrees, tabled):
    assert round(statistics.t_quantile(p, degrees), 3) == tabled


def test_t_quantile_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        statistics.t_quantile(0.975, 0)


def test_an_interval_has_the_level_and_the_degrees_that_it_says():
    estimate = statistics.Estimate(10.0, 2.0, 5)
    assert statistics.interval(estimate) == pytest.approx((10 - 2.776445 * 2, 10 + 2.776445 * 2))
    assert statistics.interval(estimate, 0.99) == pytest.approx((10 - 4.604095 * 2, 10 + 4.604095 * 2))


def test_quantiles_are_numpys():
    rng = random.Random(2)
    for count in (1, 2, 3, 10, 11):
        values = sorted(rng.uniform(-5, 5) for _ in range(count))
        for p in (0.0, 0.1, 0.5, 0.77, 0.99, 1.0):
            assert statistics.quantile(values, p) == pytest.approx(np.quantile(values, p))
    with pytest.raises(ValueError, match="no values"):
        statistics.quantile([], 0.5)


def test_packed_lists_are_half_precision_and_none_where_they_were_no_number():
    values = np.array([0.5, math.nan, 65504.0, 1e-7], dtype="<f2")
    found = statistics.unpacked(values.tobytes())
    assert found[:3] == [0.5, None, 65504.0] and found[3] == pytest.approx(1.19e-7, rel=0.01)
    assert statistics.unpacked([1.0, None]) == [1.0, None]


def test_beyond_exp_300_a_perplexity_stays_a_number():
    assert statistics.perplexity(quality([[299.0]])).value == pytest.approx(math.exp(299))
    assert statistics.perplexity(quality([[301.0]])).value == pytest.approx(math.exp(300))


def test_a_delta_where_each_lost_a_token_of_its_own_is_over_what_both_have():
    rng = random.Random(4)
    own, base = ([[rng.uniform(1, 3) for _ in range(6)] for _ in range(4)] for _ in range(2))
    own[0][2] = base[0][4] = base[2][1] = None
    own[3] = [None] * 6
    pairs = [
        [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        for a, b in zip(own, base, strict=True)
    ]
    pairs = [pair for pair in pairs if pair]
    assert [len(pair) for pair in pairs] == [4, 6, 5]
    sums, counts = np.array([np.sum(pair, 0) for pair in pairs]), np.array([len(pair) for pair in pairs])
    ratios = sums.sum(0) / counts.sum()
    ppl = np.exp(ratios)
    z = (ppl * (sums - counts[:, None] * ratios)) @ [1, -1]
    found = statistics.perplexity_delta(quality(own), quality(base))
    assert (found.value, found.windows) == (pytest.approx(ppl[0] - ppl[1]), 3)
    assert found.se == pytest.approx(math.sqrt(3 / 2 * (z**2).sum()) / 15)
    # A window whose list one of the two lacks is left out, whichever it is.
    for side in (0, 1):
        bare = [quality(own), quality(base)]
        del bare[side]["windows"][0]["nll"]
        assert statistics.perplexity_delta(*bare).windows == 2


@pytest.mark.parametrize("metric", ["perplexity", "perplexity_delta", "kld_mean", "top1_agreement", "rms_dp"])
def test_intervals_of_random_halves_cover_the_whole_as_often_as_they_claim(metric):
    """1,000 random halves of 80 windows; a half of a finite set errs by sqrt(1 - 1/2) of the stated error."""
    rng = random.Random(11)
    windows, tokens, draws = 80, 30, 1000
    base, variant = correlated(rng, windows, tokens)
    klds, tops, dps = [], [], []
    for _ in range(windows):
        level = rng.lognormvariate(-3, 0.4)
        klds.append([level * rng.expovariate(1) for _ in range(tokens)])
        share = min(1.0, rng.betavariate(18, 2))
        tops.append([int(rng.random() < share) for _ in range(tokens)])
        dps.append([rng.gauss(0, math.sqrt(level)) for _ in range(tokens)])
    q, base_q = quality(variant, klds, tops, dps), quality(base)

    def estimate(chosen):
        part = {"windows": [q["windows"][i] for i in chosen]}
        if metric == "perplexity_delta":
            return statistics.perplexity_delta(part, {"windows": [base_q["windows"][i] for i in chosen]})
        if metric == "kld_mean":
            return statistics.divergence(part)
        return getattr(statistics, {"top1_agreement": "agreement"}.get(metric, metric))(part)

    truth = estimate(range(windows)).value
    covered = naive = 0
    for _ in range(draws):
        chosen = rng.sample(range(windows), windows // 2)
        found = estimate(chosen)
        found = found._replace(se=found.se * math.sqrt(0.5))
        low, high = statistics.interval(found)
        covered += low <= truth <= high
        if metric == "perplexity":
            # What independence of tokens would claim: the same, from tokens instead of windows.
            flat = [v for i in chosen for v in q["windows"][i]["nll"]]
            mean = sum(flat) / len(flat)
            se = math.exp(mean) * math.sqrt(0.5 * sum((v - mean) ** 2 for v in flat) / (len(flat) - 1) / len(flat))
            naive += abs(found.value - truth) <= 1.96 * se
    # 0.95 with a binomial error of 0.007; the skew of a perplexity costs a percent.
    assert 0.93 <= covered / draws <= 0.97
    if metric == "perplexity":
        assert naive / draws < 0.80, "the correlation inside windows must matter, or the test shows nothing"


def test_imports_no_engine():
    code = "import sys, workbench.report.estimates; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_share_of_none_or_all_of_a_few_is_not_certain():
    """Wilson's ends are where the share lies 1.96 of its own standard errors away: no error of 0 for 0 of 10."""
    for right, n in ((0, 10), (10, 10), (3, 10), (400, 1000)):
        share, ends = right / n, statistics.share_interval([1] * right + [0] * (n - right))
        for end in ends:
            if end not in (0.0, 1.0):
                assert abs(end - share) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-5)
        assert ends[0] <= share <= ends[1]
        assert (ends[0] > 0, ends[1] < 1) == (right > 0, right < n)
    assert statistics.share_interval([0] * 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert statistics.share_interval([1] * 10) == (pytest.approx(0.7225, abs=1e-4), 1.0)


def test_a_difference_of_shares_is_not_certain_either():
    """All lost of ten: told apart, but not by exactly 100 points. One lost of one: not told apart."""
    low, high = statistics.share_delta_interval([0] * 10, [1] * 10)
    assert low == -1.0 and high == pytest.approx(-1 + math.sqrt(2) * 0.2775, abs=1e-3)
    assert statistics.share_delta_interval([0], [1])[1] > 0
    own, base = [1, 1, 0, 0], [1, 1, 1, 0]
    low, high = statistics.share_delta_interval(own, base)
    assert (-high, -low) == pytest.approx(statistics.share_delta_interval(base, own))
    assert low < -0.25 < 0 < high
