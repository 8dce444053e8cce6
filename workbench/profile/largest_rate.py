"""The largest rate at which a share of the requests keeps given limits, found by trials at rates that it asks for.

Waiting in a queue is correlated: one burst makes many requests late, so that a thousand of them tell less than a
thousand. Each trial is therefore one observation: a rate, and the share that kept the limits there. Bisection brackets
the rate; trials around it then give a logistic line of the share against the logarithm of the rate, whose scatter is
estimated between the trials (quasi-likelihood; P. McCullagh and J. A. Nelder, Generalized Linear Models, 2nd ed. 1989,
section 4.5), and the rate at which it crosses the wanted share, with the interval of E. C. Fieller (J. Royal
Statistical Society B 16, 1954). Where shares jump from all to none between two rates there is no line: then those two
are the interval.

Rejected: an interval of the share at each rate, from its requests as if they were independent (far too narrow), or from
batches of them (a trial in which all kept the limits has no scatter at all).
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from itertools import cycle
from typing import NamedTuple

from workbench.report.estimates import t_quantile

ATTAINED = 0.95
"""Share of the requests that must keep the limits."""
BRACKET = 1.3
"""Ends of a bracket this near, as a ratio, are refined by a line and no longer by halves."""
NARROW = 1.25
"""An interval whose ends are this near ends the search."""
AROUND = (0.8, 1.18, 0.92, 1.1)
"""Where around the rate trials are, as factors: far enough apart for a line to have a slope."""
NEAR = 1.43
"""Trials farther from it, as a ratio, are not on that line."""
FARTHEST = 2.0**10
"""How far from the first rate is looked."""
LEAST, MOST = 8, 48
"""Trials around the rate, at the least and at the most."""


class Trial(NamedTuple):
    """A rate that was tried, requests a second."""

    rate: float
    kept: int
    asked: int

    @property
    def good(self) -> bool:
        return self.kept >= ATTAINED * self.asked


class Found(NamedTuple):
    """The largest rate's 95 % interval, requests a second: from 0 where none was small enough, to infinity where none
    was too large."""

    low: float
    high: float
    trials: tuple[Trial, ...]


def largest_rate(first: float) -> Generator[float, tuple[int, int], Found]:
    """Yields rates to try and is sent how many of how many requests kept the limits; returns what it found.

    `first`: where to begin, the nearer the better.
    """
    trials: list[Trial] = []
    rate = first
    while 1 / FARTHEST < rate / first < FARTHEST:
        trials.append(Trial(rate, *(yield rate)))
        low, high = _bracket(trials)
        if low > 0 and high < math.inf:
            break
        rate = rate * 2 if trials[-1].good else rate / 2
    else:
        return Found(*_bracket(trials), tuple(trials))
    while high / low > BRACKET:
        rate = math.sqrt(low * high)
        trials.append(Trial(rate, *(yield rate)))
        low, high = _bracket(trials)
    start = middle = math.sqrt(low * high)
    line = None
    for done, factor in zip(range(MOST), cycle(AROUND), strict=False):
        low, high = line[1:] if line else _bracket(trials)
        if done >= LEAST and low and high / low <= NARROW:
            break
        jumps = line is None and done >= LEAST and 0 < low < high < math.inf
        rate = math.sqrt(low * high) if jumps else middle * factor
        trials.append(Trial(rate, *(yield rate)))
        line = crossing([each for each in trials if 1 / NEAR < each.rate / middle < NEAR])
        if line:
            # A line through few trials may point anywhere.
            middle = min(max(line[0], start / NARROW), start * NARROW)
    return Found(*(line[1:] if line else _bracket(trials)), tuple(trials))


def _bracket(trials: Sequence[Trial]) -> tuple[float, float]:
    """The largest rate up to which all trials were good, and the smallest from which on none was."""
    low = max((each.rate for each in trials if all(t.good for t in trials if t.rate <= each.rate)), default=0.0)
    high = min(
        (each.rate for each in trials if not any(t.good for t in trials if t.rate >= each.rate)), default=math.inf
    )
    return low, high


def crossing(trials: Sequence[Trial]) -> tuple[float, float, float] | None:
    """The rate at which the line through trials crosses `ATTAINED`, and its 95 % interval; None where there is no line
    (too few trials, all on one side), or the interval has no end."""
    if len(trials) < 4:
        return None
    center = math.fsum(math.log(each.rate) for each in trials) / len(trials)
    places = [math.log(each.rate) - center for each in trials]
    height, slope = 2.0, -1.0
    for _ in range(100):  # Newton's method on the likelihood, each step kept short.
        shares = [1 / (1 + math.exp(-max(-30.0, min(30.0, height + slope * x)))) for x in places]
        weights = [each.asked * share * (1 - share) for each, share in zip(trials, shares, strict=True)]
        misses = [each.kept - each.asked * share for each, share in zip(trials, shares, strict=True)]
        aa, ab, bb = (math.fsum(w * x**power for w, x in zip(weights, places, strict=True)) for power in (0, 1, 2))
        whole, turned = math.fsum(misses), math.fsum(miss * x for miss, x in zip(misses, places, strict=True))
        room = aa * bb - ab * ab
        if room < 1e-12:
            return None
        up, round_ = (bb * whole - ab * turned) / room, (aa * turned - ab * whole) / room
        height, slope = height + max(-3.0, min(3.0, up)), slope + max(-30.0, min(30.0, round_))
        if abs(up) + abs(round_) < 1e-9:
            break
    else:
        return None
    degrees = len(trials) - 2
    scatter = math.fsum(miss * miss / max(1e-9, weight) for miss, weight in zip(misses, weights, strict=True)) / degrees
    square = max(1.0, scatter) * t_quantile(0.975, degrees) ** 2 / room
    # Where (height - wanted + slope x)^2 is at most t^2 times its variance.
    above = height - math.log(ATTAINED / (1 - ATTAINED))
    a, b, c = slope * slope - square * aa, above * slope + square * ab, above * above - square * bb
    inside = b * b - a * c
    if slope >= 0 or a <= 0 or inside < 0:
        return None
    root = math.sqrt(inside)
    ends = [center + x for x in (-above / slope, (-b - root) / a, (-b + root) / a)]
    if max(map(abs, ends)) > 300:
        return None
    middle, low, high = map(math.exp, ends)
    return middle, low, high
