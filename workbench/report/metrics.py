"""Numbers derived from rows: what a metric is, its unit, which way is better, how it is computed.

Rows hold raw samples; everything here is a view on them, so that a better estimator needs no new
measurement. A new metric is one line in `METRICS`, whose order is that of the columns. None means "not
measured"; NaN and infinity never leave this module.

The statistics of quality, with errors that count windows as clusters and keep the covariance with the base,
are in `statistics.py`; here they meet rows. Errors of speeds: `interval`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from workbench.records import Row
from workbench.report import estimates as quality_of
from workbench.report.speeds import (
    bandwidth_fraction,
    decode_samples,
    energy_j_per_token,
    finite_number,
    itl,
    median,
    prefill_samples,
    ttft_samples,
)


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
    return row.quality.get("reference_digest") if row.quality else None


def nonfinite(row: Row) -> int | None:
    """Scored tokens whose logits were not finite; they are in no other number. None if not scored."""
    return quality_of.nonfinite(row.quality) if row.quality else None


def _memory(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        return finite_number(row.measurement.memory.get(key)) if row.measurement else None

    return value


def _load_s(row: Row) -> float | None:
    return finite_number(row.measurement.load_s) if row.measurement else None


def _disk_bytes(row: Row) -> float | None:
    # An artifact that could not be made is stored with no bytes.
    return row.artifact.disk_bytes or None


def _bits_per_weight(row: Row) -> float | None:
    return row.artifact.bits_per_weight or None


def _divergence(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        quality = _compared(row)
        found = quality_of.divergence(quality) if quality else None
        return finite_number(found[key]) if found else None

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
    name: str,
    unit: str,
    better: Literal["higher", "lower"],
    estimate: Callable[[Row], quality_of.Estimate | None],
    text: str,
    title: str,
) -> Metric:
    """A metric whose value and error come together."""

    def value(row: Row) -> float | None:
        found = estimate(row)
        return finite_number(found.value) if found else None

    def error(row: Row) -> float | None:
        found = estimate(row)
        return finite_number(found.se) if found else None

    return Metric(name, unit, better, value, text, title, error)


OF_THE_REFERENCE = (
    "kld_mean",
    "kld_p50",
    "kld_p90",
    "kld_p99",
    "kld_p999",
    "kld_max",
    "top1_agreement",
    "rms_dp",
)
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


def _quality(row: Row) -> dict[str, Any] | None:
    """What the worker found, if it scored a single token."""
    quality = row.quality
    return quality if quality and any(window["count"] for window in quality["windows"]) else None


def _compared(row: Row) -> dict[str, Any] | None:
    """The same, if a single token was compared with the base's distribution."""
    quality = _quality(row)
    return quality if quality and any(window.get("kld_count") for window in quality["windows"]) else None
