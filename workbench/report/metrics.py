"""Numbers derived from rows: what a metric is, its unit, which way is better, how it is computed.

Rows hold raw samples; everything here is a view on them, so that a better estimator needs no new
measurement. A new metric is one line in `METRICS`, whose order is that of the columns. None means "not
measured"; NaN and infinity never leave this module.

The statistics of quality, with errors that count windows as clusters and keep the covariance with the base,
are in `statistics.py`; here they meet rows. Errors of speeds: `interval`.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workbench.records import Row, Speed
from workbench.report import statistics as quality_of

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Student's t, 97.5 % quantile, by degrees of freedom."""


@dataclass(frozen=True)
class Metric:
    """One number a row yields."""

    name: str
    unit: str
    """SI: `s`, `B`, `tok/s`, `bit`; empty for a pure number."""
    better: Literal["higher", "lower"] | None
    value: Callable[[Row], float | None]
    text: str
    """Format specification of the number in its display unit."""
    title: str
    error: Callable[[Row], float | None] | None = None
    """One standard error of the value, windows as clusters, where it has one of that kind."""


def median(samples: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(samples) if samples else None


def interval(samples: Sequence[float], turns: Sequence[int] = ()) -> tuple[float, float] | None:
    """A 95 % confidence interval of the median of positive samples; None for fewer than two.

    `turns` says how many samples, one after the other, were made in one go. What belongs together drifted together: of
    several turns each counts once, by the mean of its logarithms, as Student's interval below has it.

    Six or more: the order statistics x_(k), x_(n+1-k) with the largest k whose coverage
    1 - 2 * P(Binomial(n, 1/2) < k) is at least 0.95; nothing is assumed of the distribution (David and
    Nagaraja, Order Statistics, 3rd ed. 2003, section 7.1). With five even the extremes cover only
    93.75 %, so below six it is Student's interval of the mean of the logarithms: exact where times scatter
    log-normally, whose median is exp(that mean); it stays positive and always holds the sample median.
    """
    if len(turns) > 1 and sum(turns) == len(samples) > len(turns):
        ends = list(itertools.accumulate(turns))
        each = [samples[end - many : end] for many, end in zip(turns, ends, strict=True)]
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
    half = T_975[count - 1] * statistics.stdev(logs) / math.sqrt(count)
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


def prefill_interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of the median prefill speed."""
    speed = headline(row)
    return interval(_prefill(speed), speed.turns) if speed else None


def decode_interval(row: Row) -> tuple[float, float] | None:
    """The 95 % interval of the median decoding speed."""
    speed = headline(row)
    return interval(_decode(speed), speed.turns) if speed else None


@dataclass(frozen=True)
class Point:
    """One speed beside the headline's: `pp2048`, `tg128 @ d2048`, `tg128 @ d512 b8`, `served b8`; tokens a second."""

    name: str
    median: float
    interval: tuple[float, float] | None


def points(row: Row) -> list[Point]:
    """Every further workload point: prefill by prompt length, decode by depth and batch, and what was served."""
    found: list[tuple[str, list[float], list[int]]] = []
    if row.measurement is None:
        return []
    for speed in row.measurement.speeds[1:]:
        many = f" b{speed.batch}" if speed.batch > 1 else ""
        found.append((f"pp{speed.prompt_tokens}{many}", _prefill(speed), speed.turns))
        found.append((f"tg{speed.new_tokens} @ d{speed.prompt_tokens}{many}", _decode(speed), speed.turns))
    for served in row.measurement.served:
        tokens = sum(served.new_tokens)
        how = "" if served.continuous else " by groups"
        rates = [rate for each in served.seconds if (rate := _rate(tokens, _number(each)))]
        found.append((f"served b{served.slots}{how}", rates, served.turns))
    return [Point(name, statistics.median(rates), interval(rates, turns)) for name, rates, turns in found if rates]


def itl(row: Row, share: float) -> float | None:
    """The quantile of the inter-token latency, seconds, over every decoding step of every repeat that gained tokens."""
    speed = headline(row)
    if speed is None:
        return None
    steps = sorted(
        seconds
        for step_s, step_tokens in zip(speed.step_s, speed.step_tokens, strict=False)
        for each, gained in zip(step_s, step_tokens, strict=False)
        if gained and (seconds := _number(each)) is not None
    )
    return quality_of.quantile(steps, share) if steps else None


def ttft_samples(row: Row) -> list[float]:
    """Seconds from submitting the prompts to the first new token of all sequences, of each repeat."""
    speed = headline(row)
    return [seconds for each in speed.first_token_s if (seconds := _number(each))] if speed else []


def energy_j_per_token(row: Row) -> float | None:
    """Joules of the whole machine a new token, prompt included: the median over repeats; None where nothing counts."""
    speed = headline(row)
    joules = [value for each in (speed.energy_j if speed else []) if (value := _number(each)) is not None]
    return statistics.median(joules) / (speed.new_tokens * speed.batch) if speed and joules else None


def bandwidth_fraction(row: Row) -> float | None:
    """Bytes a second that decoding reads at the least, over what this machine copies (read and written both).

    A step reads all weights and, of each sequence, the keys and values so far: half the answer's are there on
    average. Weights that are a table to look rows up in are counted too, so an untied embedding makes it a little high.
    The roofline of S. Williams et al., Communications of the ACM 52 (2009), for a memory-bound step.
    """
    speed = headline(row)
    copied = _number(row.machine.get("copy_bytes_per_s"))
    if speed is None or row.measurement is None or not copied:
        return None
    weights = _number(row.measurement.memory.get("weights"))
    cache = _number(row.measurement.memory.get("kv_cache"))
    rates = [
        rate
        for step_s, gained in zip(speed.step_s, speed.step_tokens, strict=False)
        if (rate := _rate(len(gained), math.fsum(step_s)))
    ]
    if not weights or cache is None or not rates:
        return None
    depth = (speed.prompt_tokens + speed.new_tokens / 2) / (speed.prompt_tokens + speed.new_tokens)
    return (weights + cache * depth) * statistics.median(rates) / copied


def _prefill(speed: Speed | None) -> list[float]:
    if speed is None:
        return []
    tokens = speed.prompt_tokens * speed.batch
    return [rate for seconds in speed.first_token_s if (rate := _rate(tokens, _number(seconds)))]


def _decode(speed: Speed | None) -> list[float]:
    if speed is None:
        return []
    samples = []
    for step_s, step_tokens in zip(speed.step_s, speed.step_tokens, strict=False):
        seconds = [_number(step) for step in step_s]
        if len(step_s) != len(step_tokens) or None in seconds:
            continue  # half a repeat has a time, but not that of its tokens
        rate = _rate(sum(step_tokens), math.fsum(step for step in seconds if step is not None))
        if rate:
            samples.append(rate)
    return samples


def perplexity(row: Row) -> float | None:
    """exp(mean negative log-likelihood) over the scored tokens with finite logits."""
    quality = _quality(row)
    return quality_of.perplexity(quality).value if quality else None


def perplexity_se(row: Row) -> float | None:
    """Its standard error, windows as clusters; None for fewer than two windows."""
    quality = _quality(row)
    return quality_of.perplexity(quality).se if quality else None


def perplexity_delta(row: Row, base: Row) -> quality_of.Estimate | None:
    """The row's perplexity minus the base's, paired over the tokens finite in both, with the error of the
    difference. None if either was not scored, or not on the same tokens."""
    quality, base_quality = _quality(row), _quality(base)
    if quality is None or base_quality is None or not same_tokens(row, base):
        return None
    try:
        return quality_of.perplexity_delta(quality, base_quality)
    except ValueError:  # no token that is finite in both
        return None


def task_accuracy(row: Row, name: str) -> quality_of.Estimate | None:
    """Share of a task's items that were right; None if the row was not asked."""
    return quality_of.accuracy(_correct(row, name))


def task_delta(row: Row, base: Row, name: str) -> quality_of.Estimate | None:
    """The row's accuracy less the base's, paired by item; None if not both were asked the same."""
    own, other = _correct(row, name), _correct(base, name)
    task, base_task = row.tasks.get(name), base.tasks.get(name)
    if task is None or base_task is None or task.digest != base_task.digest or len(own) != len(other):
        return None
    return quality_of.accuracy_delta(own, other)


def _correct(row: Row, name: str) -> list[float]:
    found = row.measurement.tasks.get(name) if row.measurement else None
    return list(found["correct"]) if found else []


def same_tokens(row: Row, base: Row) -> bool:
    """Whether both were scored on one evaluation, window by window alike."""
    if row.evaluation is None or base.evaluation is None or row.evaluation.digest != base.evaluation.digest:
        return False
    sizes, base_sizes = (
        [window["count"] + window["nonfinite"] for window in (_quality(each) or {}).get("windows", [])]
        for each in (row, base)
    )
    return sizes == base_sizes


def reference(row: Row) -> str | None:
    """The digest of the base's distributions that the row was compared with; None if it was with none.

    Divergences from two references, even of one base, are not comparable.
    """
    quality = row.measurement.quality if row.measurement else None
    return quality.get("reference_digest") if quality else None


def nonfinite(row: Row) -> int | None:
    """Scored tokens whose logits were not finite; they are in no other number. None if not scored."""
    quality = row.measurement.quality if row.measurement else None
    return quality_of.nonfinite(quality) if quality else None


def _memory(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        return _number(row.measurement.memory.get(key)) if row.measurement else None

    return value


def _load_s(row: Row) -> float | None:
    return _number(row.measurement.load_s) if row.measurement else None


def _disk_bytes(row: Row) -> float | None:
    # An artifact that could not be made is stored with no bytes.
    return row.artifact.disk_bytes or None


def _bits_per_weight(row: Row) -> float | None:
    return row.artifact.bits_per_weight or None


def _divergence(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        quality = _compared(row)
        found = quality_of.divergence(quality) if quality else None
        return _number(found[key]) if found else None

    return value


def _kld_mean(row: Row) -> quality_of.Estimate | None:
    quality = _compared(row)
    found = quality_of.divergence(quality) if quality else None
    return found["mean"] if found else None


def _top1_agreement(row: Row) -> quality_of.Estimate | None:
    quality = _compared(row)
    return quality_of.agreement(quality) if quality else None


def _rms_dp(row: Row) -> quality_of.Estimate | None:
    quality = _compared(row)
    return quality_of.rms_dp(quality) if quality else None


def _bits_per_byte(row: Row) -> quality_of.Estimate | None:
    quality = _quality(row)
    if quality is None or row.evaluation is None or not row.evaluation.scored_bytes:
        return None
    return quality_of.bits_per_byte(quality, row.evaluation.scored_bytes)


def _estimated(
    name: str, unit: str, better: Literal["higher", "lower"], estimate: Callable[[Row], quality_of.Estimate | None],
    text: str, title: str,
) -> Metric:  # fmt: skip
    """A metric whose value and error come together."""

    def value(row: Row) -> float | None:
        found = estimate(row)
        return _number(found.value) if found else None

    def error(row: Row) -> float | None:
        found = estimate(row)
        return _number(found.se) if found else None

    return Metric(name, unit, better, value, text, title, error)


OF_THE_REFERENCE = (
    "kld_mean", "kld_p50", "kld_p90", "kld_p99", "kld_p999", "kld_max", "top1_agreement", "rms_dp",
)  # fmt: skip
"""The metrics that are about the base's distributions too."""

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bits_per_weight", "bit", "lower", _bits_per_weight, ".2f", "bits per weight"),
        Metric("disk_bytes", "B", "lower", _disk_bytes, ".1f", "size"),
        Metric("load_s", "s", "lower", _load_s, ".1f", "load"),
        Metric("peak_rss_bytes", "B", "lower", _memory("peak_rss"), ".1f", "peak memory"),
        Metric("peak_vram_bytes", "B", "lower", _memory("peak_vram"), ".1f", "peak VRAM"),
        Metric("weights_bytes", "B", "lower", _memory("weights"), ".1f", "weights"),
        Metric("kv_cache_bytes", "B", "lower", _memory("kv_cache"), ".1f", "KV cache"),
        Metric("workspace_bytes", "B", "lower", _memory("workspace"), ".1f", "workspace"),
        Metric("prefill_tok_s", "tok/s", "higher", lambda row: median(prefill_samples(row)), ".1f", "prefill"),
        Metric("decode_tok_s", "tok/s", "higher", lambda row: median(decode_samples(row)), ".1f", "decode"),
        Metric("ttft_s", "s", "lower", lambda row: median(ttft_samples(row)), ".3f", "first token"),
        Metric("itl_p50_s", "s", "lower", lambda row: itl(row, 0.5), ".4f", "between tokens, median"),
        Metric("itl_p95_s", "s", "lower", lambda row: itl(row, 0.95), ".4f", "between tokens, 95 %"),
        Metric("itl_p99_s", "s", "lower", lambda row: itl(row, 0.99), ".4f", "between tokens, 99 %"),
        Metric("energy_j_per_token", "J", "lower", energy_j_per_token, ".3f", "energy a token"),
        Metric("bandwidth_fraction", "", "higher", bandwidth_fraction, ".3f", "of the copy bandwidth"),
        Metric("perplexity", "", "lower", perplexity, ".3f", "perplexity", perplexity_se),
        _estimated("kld_mean", "nat", "lower", _kld_mean, ".4f", "KLD"),
        Metric("kld_p50", "nat", "lower", _divergence("p50"), ".4f", "KLD, median"),
        Metric("kld_p90", "nat", "lower", _divergence("p90"), ".4f", "KLD, 90 %"),
        Metric("kld_p99", "nat", "lower", _divergence("p99"), ".4f", "KLD, 99 %"),
        Metric("kld_p999", "nat", "lower", _divergence("p999"), ".4f", "KLD, 99.9 %"),
        Metric("kld_max", "nat", "lower", _divergence("max"), ".4f", "KLD, maximum"),
        _estimated("top1_agreement", "", "higher", _top1_agreement, ".4f", "same top"),
        _estimated("rms_dp", "", "lower", _rms_dp, ".4f", "RMS Δp"),
        _estimated("bits_per_byte", "bit", "lower", _bits_per_byte, ".4f", "bits per byte"),
    )
}


def _rate(tokens: int, seconds: float | None) -> float | None:
    return _number(tokens / seconds) if seconds and seconds > 0 and tokens > 0 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _quality(row: Row) -> dict[str, Any] | None:
    """What the worker found, if it scored a single token."""
    quality = row.measurement.quality if row.measurement else None
    return quality if quality and any(window["count"] for window in quality["windows"]) else None


def _compared(row: Row) -> dict[str, Any] | None:
    """The same, if a single token was compared with the base's distribution."""
    quality = _quality(row)
    return quality if quality and any(window.get("kld_count") for window in quality["windows"]) else None
