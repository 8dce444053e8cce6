"""From raw samples of a workload to rates and their intervals."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.records import Row, Speed
from workbench.report import estimates, loads


def interval(samples: Sequence[float], rounds: Sequence[int] = ()) -> tuple[float, float] | None:
    """A 95 % confidence interval of the median of positive samples; None for fewer than two.

    `rounds` says how many samples, one after the other, were made in one go. What belongs together drifted together: of
    several rounds each counts once, by the mean of its logarithms, as Student's interval below has it.

    Six or more: the order statistics x_(k), x_(n+1-k) with the largest k whose coverage
    1 - 2 * P(Binomial(n, 1/2) < k) is at least 0.95; nothing is assumed of the distribution (David and
    Nagaraja, Order Statistics, 3rd ed. 2003, section 7.1). With five even the extremes cover only
    93.75 %, so below six it is Student's interval of the mean of the logarithms: exact where times scatter
    log-normally, whose median is exp(that mean); it stays positive and always holds the sample median.
    """
    if len(rounds) > 1 and sum(rounds) == len(samples) > len(rounds):
        ends = list(itertools.accumulate(rounds))
        each = [samples[end - many : end] for many, end in zip(rounds, ends, strict=True)]
        spread = interval([math.exp(statistics.fmean(map(math.log, part))) for part in each])
        middle = statistics.median(samples)
        return spread and (min(spread[0], middle), max(spread[1], middle))
    count = len(samples)
    if count < 2:
        return None
    if count > 5:
        ordered = sorted(samples)
        # below = 2^n * P(Binomial <= rank), in whole numbers so that no n is too large for it
        rank, ways, below = 0, 1, 1
        while 40 * below <= 2**count:
            rank += 1
            ways = ways * (count - rank + 1) // rank
            below += ways
        return ordered[rank - 1], ordered[count - rank]
    logs = [math.log(sample) for sample in samples]
    # To three decimals, as tables of it have them: the intervals of published rows keep their digits.
    half = round(estimates.t_quantile(0.975, count - 1), 3) * statistics.stdev(logs) / math.sqrt(count)
    center = statistics.fmean(logs)
    try:
        return math.exp(center - half), math.exp(center + half)
    except OverflowError:
        return None


def headline(row: Row) -> Speed | None:
    """The workload point that the speed columns show: the first one measured."""
    return row.measurement.speeds[0] if row.measurement and row.measurement.speeds else None


def prefill_samples(row: Row) -> list[float]:
    """Prompt tokens a second of each repeat, over the whole batch, up to the first new token."""
    return _prefill(headline(row))


def decode_samples(row: Row) -> list[float]:
    """New tokens a second of each repeat, over the whole batch, after the first token."""
    return _decode(headline(row))


def median_interval(row: Row, samples: Callable[[Row], list[float]]) -> tuple[float, float] | None:
    """The 95 % interval of the median of `prefill_samples` or `decode_samples`."""
    speed = headline(row)
    return interval(samples(row), speed.rounds) if speed else None


@dataclass(frozen=True)
class Rate:
    """A speed in tokens a second: `pp2048`, `tg128 @ d2048`, `tg128 @ d512 b8`, `served b8`."""

    name: str
    median: float
    interval: tuple[float, float] | None


def at(row: Row, batch: int | None, context: int | None) -> Speed | None:
    """The workload point of so many sequences (the headline's, if None) that is of at least `context` tokens each: the
    shortest; None if none was measured."""
    many = batch or row.workload.points[0][1]
    speeds = row.measurement.speeds if row.measurement else []
    found = [each for each in speeds if each.batch == many and each.prompt_tokens + each.new_tokens >= (context or 0)]
    return min(found, key=lambda each: each.prompt_tokens, default=None) if context else next(iter(found), None)


def prefill_rate(speed: Speed) -> Rate | None:
    """Of a point's prompts, up to the first new token."""
    return _rate(f"pp{speed.prompt_tokens}{_many(speed)}", _prefill(speed), speed.rounds)


def decode_rate(speed: Speed) -> Rate | None:
    """Of a point's new tokens, after the first."""
    return _rate(f"tg{speed.new_tokens} @ d{speed.prompt_tokens}{_many(speed)}", _decode(speed), speed.rounds)


def served_rates(row: Row) -> list[tuple[int, Rate]]:
    """(Sequence slots, new tokens a second) of requests that were served together."""
    found = []
    for served in row.measurement.served if row.measurement else ():
        how, tokens = "" if served.continuous else " by groups", sum(served.new_tokens)
        rate = _rate(
            f"served b{served.slots}{how}", [tokens / each for each in served.seconds if tokens], served.rounds
        )
        found += [(served.slots, rate)] if rate else []
    return found + _under_load(row)


def _under_load(row: Row) -> list[tuple[int, Rate]]:
    """The same of a server's closed loops."""
    rates = loads.output_rates(row).items()
    return [(slots, Rate(f"served b{slots}", statistics.median(each), interval(each))) for slots, each in rates]


def further_rates(row: Row) -> list[Rate]:
    """Every further workload point: prefill by prompt length, decode by depth and batch, and what was served."""
    speeds = row.measurement.speeds[1:] if row.measurement else []
    points = [rate for speed in speeds for rate in (prefill_rate(speed), decode_rate(speed)) if rate]
    return [*points, *(rate for _, rate in served_rates(row))]


def _rate(name: str, rates: list[float], rounds: list[int]) -> Rate | None:
    return Rate(name, statistics.median(rates), interval(rates, rounds)) if rates else None


def _many(speed: Speed) -> str:
    return f" b{speed.batch}" if speed.batch > 1 else ""


def itl(share: float) -> Callable[[Row], float | None]:
    """The quantile of the inter-token latency, seconds, over every decoding step of every repeat that gained tokens."""

    def value(row: Row) -> float | None:
        speed = headline(row)
        steps = sorted(
            seconds
            for step_s, step_tokens in (zip(speed.step_s, speed.step_tokens, strict=True) if speed else ())
            for seconds, gained in zip(step_s, step_tokens, strict=True)
            if gained
        )
        return estimates.quantile(steps, share) if steps else None

    return value


def ttft_samples(row: Row) -> list[float]:
    """Seconds from submitting the prompts to the first new token of all sequences, of each repeat."""
    speed = headline(row)
    return speed.first_token_s if speed else []


def energy_j_per_token(row: Row) -> float | None:
    """Joules a new token, prompt included, by the counters that the row's settings name (`energy_of`): the median over
    repeats; None where nothing counts."""
    speed = headline(row)
    joules = [each for each in (speed.energy_j if speed else []) if each is not None]
    return statistics.median(joules) / (speed.new_tokens * speed.batch) if speed and joules else None


def bandwidth_fraction(row: Row) -> float | None:
    """Bytes a second that decoding reads at the least, over what this machine copies (read and written both).

    A step reads all weights and, of each sequence, the keys and values so far: half the answer's are there on
    average. An embedding that is not the head too is left out, where the engine said how large it is: a step looks one
    row of it up. The roofline of S. Williams et al., Communications of the ACM 52 (2009), for a memory-bound step.
    """
    speed = headline(row)
    copied = row.machine.copy_bytes_per_s
    if speed is None or row.measurement is None or not copied:
        return None
    memory = row.measurement.memory
    weights, cache = memory.get("weights"), memory.get("kv_cache")
    looked_up = memory.get("embedding") or 0
    rates = [len(step_s) / math.fsum(step_s) for step_s in speed.step_s if step_s]
    if not weights or cache is None or not rates:
        return None
    depth = (speed.prompt_tokens + speed.new_tokens / 2) / (speed.prompt_tokens + speed.new_tokens)
    return (weights - looked_up + cache * depth) * statistics.median(rates) / copied


def _prefill(speed: Speed | None) -> list[float]:
    if speed is None:
        return []
    return [speed.prompt_tokens * speed.batch / seconds for seconds in speed.first_token_s]


def _decode(speed: Speed | None) -> list[float]:
    if speed is None:
        return []
    return [
        tokens / math.fsum(seconds)
        for seconds, gained in zip(speed.step_s, speed.step_tokens, strict=True)
        if (tokens := sum(gained))
    ]
