"""Values and standard errors of what `worker/scoring/reducer.py` measured.

Tokens of one window share a context and are not independent: treating them so (as llama.cpp's `sqrt(var / (n
- 1))` does) understates the error. Here the window is the sampling unit, a cluster. A mean over tokens is
then a ratio of two sums over windows, R = sum(s_w) / sum(n_w), with the linearised variance

    Var(R) = W / (W - 1) * sum((s_w - R n_w)^2) / (sum n_w)^2

(W. G. Cochran, Sampling Techniques, 3rd ed. 1977, sections 2.11 and 9A; the same as the cluster-robust "CR1"
sandwich of Liang & Zeger, Biometrika 73, 1986, for a mean). Functions of means take their error by the delta
method. The errors are of a draw of windows from a text far larger than the set; for statements on the set
itself multiply by sqrt(1 - W / W_all) (Cochran, 2.6). What they do not cover is that windows cut from one
document resemble each other.

Rejected: a bootstrap over windows (the same answer for means, a seed and a thousand passes dearer) and errors
of quantiles (they would need it).

A quality is the dictionary that `Reducer.result()` returns, in full or as `quality.compact` stores it. An
`Estimate` carries the number of windows, since with few of them 1.96 standard errors are not a 95 % interval;
`interval` takes Student's t.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

from workbench.records import Quality

Total = Literal["nll_sum", "kld_sum", "same_top_sum", "dp_square_sum"]
Count = Literal["count", "kld_count"]
Z = NormalDist().inv_cdf(0.975)
"""Standard errors of a normal distribution to either side that hold 95 % of it."""


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit; the error is None where it cannot be known (one
    window)."""

    value: float
    se: float | None
    windows: int


def perplexity(q: Quality) -> Estimate:
    """exp(mean negative log-likelihood), and exp(R) se(R). Raises `ValueError` if no token is finite."""
    mean = _mean(_pairs(q, "nll_sum", "count"))
    value = _exp(mean.value)
    return Estimate(value, None if mean.se is None else value * mean.se, mean.windows)


def perplexity_delta(q: Quality, base_q: Quality) -> Estimate:
    """Perplexity of `q` less the base's on the same tokens, with the error of the difference.

    Per window z_w = PPL (s_w - R n_w) - PPL0 (s0_w - R0 n_w): what the windows have in common cancels before
    it is squared, which is why the error is far below that of either perplexity. Only tokens finite in both
    count (where a window has others and either lacks its per-token list, the whole window does not). Raises
    `ValueError` if the two are not of the same tokens.
    """
    variant, base = _paired(q, base_q)
    count = sum(n for _, n in variant)
    r, r0 = (_mean(pairs).value for pairs in (variant, base))
    ppl, ppl0 = _exp(r), _exp(r0)
    residuals = [ppl * (s - r * n) - ppl0 * (s0 - r0 * n0) for (s, n), (s0, n0) in zip(variant, base, strict=True)]
    return Estimate(ppl - ppl0, _error(residuals, count), len(residuals))


def mean_delta(q: Quality, base_q: Quality, total: Total, count: Count) -> Estimate | None:
    """The mean a token of `q` less the base's, both of per-window sums `total` over `count` tokens.

    Paired over windows as `perplexity_delta` is, over the tokens finite in both. None where no such token is, or where
    one has not as many windows.
    """
    try:
        one, base = _paired(q, base_q, total, count)
        mean, base_mean = (_mean(pairs).value for pairs in (one, base))
    except (ValueError, KeyError):
        return None
    residuals = [(s - mean * n) - (s0 - base_mean * n0) for (s, n), (s0, n0) in zip(one, base, strict=True)]
    return Estimate(mean - base_mean, _error(residuals, sum(n for _, n in one)), len(residuals))


def divergence(q: Quality) -> Estimate | None:
    """Mean KL divergence from the base, in nats a token; None if `q` was not compared with a reference."""
    if not _compared(q):
        return None
    return _mean(_pairs(q, "kld_sum", "kld_count"))


def divergence_quantile(q: Quality, p: float) -> float | None:
    """A quantile over tokens of the KL divergence from the base, in nats; None without per-token lists."""
    values = sorted(v for window in q["windows"] for v in unpacked(window.get("kld", ())) if v is not None)
    return quantile(values, p) if values else None


def agreement(q: Quality) -> Estimate | None:
    """Share of tokens whose likeliest id is the base's; None if `q` was not compared with a reference."""
    if not _compared(q):
        return None
    return _mean(_pairs(q, "same_top_sum", "kld_count"))


def rms_dp(q: Quality) -> Estimate | None:
    """Root mean square of the correct token's change in probability; se = se(mean square) / (2 rms)."""
    if not _compared(q):
        return None
    mean = _mean(_pairs(q, "dp_square_sum", "kld_count"))
    root = math.sqrt(mean.value)
    se = None if mean.se is None else (mean.se / (2 * root) if root else 0.0)
    return Estimate(root, se, mean.windows)


def accuracy(correct: Sequence[float]) -> Estimate | None:
    """Share of a task's items that were right, with the error of a mean of independent items (which for ones and
    zeros is sqrt(p (1 - p) / (n - 1))); None of nothing. `windows` is the number of items."""
    return _mean([(score, 1) for score in correct]) if correct else None


def accuracy_delta(correct: Sequence[float], base: Sequence[float]) -> Estimate | None:
    """Difference of two accuracies, item by item: what both get wrong cancels. Raises `ValueError` for other items."""
    return accuracy([own - other for own, other in zip(correct, base, strict=True)])


def share_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a share by E. B. Wilson (J. American Statistical Association 22, 1927): of none or all of a few
    items, too, where the standard error is 0. Scores between 0 and 1 scatter less than ones and zeros of their mean."""
    n, share = len(scores), math.fsum(scores) / len(scores)
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def share_delta_interval(scores: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the difference of two shares over the same items, from Wilson's of each and their correlation
    (R. G. Newcombe, Statistics in Medicine 17, 1998, p. 2635, method 10 without its correction for continuity)."""
    (low, high), (base_low, base_high) = share_interval(scores), share_interval(base)
    n, share, base_share = len(scores), math.fsum(scores) / len(scores), math.fsum(base) / len(base)
    scatter = math.sqrt(
        math.fsum((each - share) ** 2 for each in scores) * math.fsum((each - base_share) ** 2 for each in base)
    )
    joint = math.fsum(one * other for one, other in zip(scores, base, strict=True)) - n * share * base_share
    correlation = joint / scatter if scatter else 0.0

    def half(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    below, above = half(share - low, base_high - base_share), half(high - share, base_share - base_low)
    return share - base_share - below, share - base_share + above


def bits_per_byte(q: Quality, scored_bytes: int) -> Estimate:
    """Bits the model needs for a byte of the scored text, comparable between vocabularies.

    mean nll / ln 2 * scored tokens / `scored_bytes` (The Pile, arXiv 2101.00027, section 3.1). Excluded
    tokens are taken to cost the mean. The error takes the text's tokens a byte as given, since bytes of a
    window are not stored.
    """
    mean = _mean(_pairs(q, "nll_sum", "count"))
    scale = scored_tokens(q) / scored_bytes / math.log(2)
    return Estimate(mean.value * scale, None if mean.se is None else mean.se * scale, mean.windows)


def unpacked(stored: bytes | Sequence[float | None]) -> Sequence[float | None]:
    """A per-token list, which a row keeps as little-endian float16; None for an excluded token."""
    if not isinstance(stored, bytes):
        return stored
    values = struct.unpack(f"<{len(stored) // 2}e", stored)
    return [value if math.isfinite(value) else None for value in values]


def scored_tokens(q: Quality) -> int:
    """All scored tokens, those whose logits were not finite too."""
    return sum(window["count"] + window["nonfinite"] for window in q["windows"])


def nonfinite(q: Quality) -> int:
    """Scored tokens whose logits were not all finite; they are in no other number."""
    return sum(window["nonfinite"] for window in q["windows"])


def interval(estimate: Estimate, level: float = 0.95) -> tuple[float, float] | None:
    """Two-sided confidence interval by Student's t with windows - 1 degrees of freedom; None without an
    error."""
    if estimate.se is None:
        return None
    half = t_quantile((1 + level) / 2, estimate.windows - 1) * estimate.se
    return estimate.value - half, estimate.value + half


@cache
def t_quantile(p: float, degrees: int) -> float:
    """The p-quantile of Student's t, p between 1/2 and 1. Raises `ValueError` below one degree of freedom.

    By mpmath's incomplete beta function (Abramowitz & Stegun 26.5.27 inverted), which takes milliseconds. Rejected:
    scipy, which has the quantile itself and is 100 MB and a second to import.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    import mpmath

    def missing(t: Any) -> Any:
        return mpmath.betainc(0.5, degrees / 2, 0, t * t / (degrees + t * t), regularized=True) - (2 * p - 1)

    # It falls with every degree, from Cauchy's at one to the normal's.
    ends = NormalDist().inv_cdf(p), math.tan(math.pi * (p - 0.5))
    return float(mpmath.findroot(missing, ends, solver="illinois"))


def quantile(ordered: Sequence[float], p: float) -> float:
    """The p-quantile of ascending values, interpolated linearly between order statistics (type 7 of Hyndman & Fan, The
    American Statistician 50, 1996); raises `ValueError` for none."""
    if not ordered:
        raise ValueError("a quantile of no values")
    place = p * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _exp(nats: float) -> float:
    """exp, but at most exp(300): beyond it a model is broken, and its row must still be JSON."""
    return math.exp(min(nats, 300.0))


def _compared(q: Quality) -> bool:
    """Whether it was compared with a reference."""
    return bool(q["windows"]) and "kld_sum" in q["windows"][0]


def _pairs(q: Quality, total: Total, count: Count) -> list[tuple[float, int]]:
    """Pairs (sum, tokens) of every window that has any token left."""
    return [(window[total], window[count]) for window in q["windows"] if window[count]]


def _mean(pairs: list[tuple[float, int]]) -> Estimate:
    """Mean a token of per-window (sum, tokens), with the clustered error of the module docstring."""
    tokens = sum(n for _, n in pairs)
    if not tokens:
        raise ValueError("no scored token with finite logits")
    ratio = math.fsum(s for s, _ in pairs) / tokens
    return Estimate(ratio, _error([s - ratio * n for s, n in pairs], tokens), len(pairs))


def _error(residuals: list[float], tokens: int) -> float | None:
    windows = len(residuals)
    if windows < 2:
        return None
    return math.sqrt(windows / (windows - 1) * math.fsum(z * z for z in residuals)) / tokens


LISTS: dict[Total, Literal["nll", "kld"]] = {"nll_sum": "nll", "kld_sum": "kld"}
"""The per-token list that a sum is of, where one is kept."""


def _paired(
    q: Quality, base_q: Quality, total: Total = "nll_sum", count: Count = "count"
) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """Per-window (sum, tokens) of both over the tokens that are finite in both; a window in which that cannot be known
    is left out. Raises `ValueError` if the two are not of the same tokens."""
    listed = LISTS.get(total)
    one: list[tuple[float, int]] = []
    two: list[tuple[float, int]] = []
    if len(q["windows"]) != len(base_q["windows"]):
        raise ValueError(f"{len(q['windows'])} windows against {len(base_q['windows'])}: not the same evaluation")
    for i, (a, b) in enumerate(zip(q["windows"], base_q["windows"], strict=True)):
        if a["count"] + a["nonfinite"] != b["count"] + b["nonfinite"]:
            raise ValueError(f"window {i}: the two passes scored different numbers of tokens: not the same evaluation")
        if a["nonfinite"] == b["nonfinite"] == 0:
            pair = (a[total], a[count]), (b[total], b[count])
        elif listed and listed in a and listed in b:
            lists = zip(unpacked(a[listed]), unpacked(b[listed]), strict=True)
            both = [(x, y) for x, y in lists if x is not None and y is not None]
            pair = (math.fsum(x for x, _ in both), len(both)), (math.fsum(y for _, y in both), len(both))
        else:
            continue
        if pair[0][1]:
            one.append(pair[0])
            two.append(pair[1])
    return one, two
