"""Numbers derived from rows: what a metric is, its unit, which way is better, how it is computed, shown and judged.

Rows hold raw samples; everything here is a view on them, so that a better estimator needs no new measurement. A new
metric is one entry of `METRICS`, whose order is that of the columns: CSV, JSON and Parquet have all of them; printed
tables and pages those with a `Column`; compare, nights and history those with a `Judged`. None means "not measured";
NaN and infinity never leave this module.

How they are computed: `quality.py`, whose errors count windows as clusters, and `speeds.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Literal

from workbench.records import Row
from workbench.report import estimates, forms, loads, quality, speeds
from workbench.report.estimates import Estimate
from workbench.report.units import MIB


@dataclass(frozen=True)
class Column:
    """How people see a metric in a table."""

    heading: str
    unit: str
    """Shown unit, of pages; a printed column of bytes takes the unit that fits its largest."""
    spec: str
    """Format of the number in the shown unit."""
    scale: float = 1.0
    """What the stored number is divided by on pages."""
    help: str = ""
    """Tooltip on pages; `{workload}` is what the speeds are of."""
    printed: Literal["always", "where measured", "never"] = "never"
    """Whether the tables in text have it too; those of quality have columns of their own there (`cells.py`)."""


@dataclass(frozen=True)
class Judged:
    """Which change of a metric matters: one size for compare, nights and the history."""

    place: int
    """Turn among the judged metrics."""
    threshold: float
    """Relative change that matters unless somebody says otherwise."""
    exact: bool = False
    """Whether it has no noise at all, so that one value a side is enough."""
    nightly: bool = True
    """Whether a night opens an issue for it. Not for a load, which is mostly the page cache's, nor for what another
    metric says too; compare and history have them all the same."""
    plotted: bool = False
    """Whether pages draw it over time."""


@dataclass(frozen=True)
class Metric:
    """One number a row yields."""

    name: str
    title: str
    """Name in prose."""
    unit: str
    """SI: `s`, `B`, `tok/s`, `bit`; empty for a pure number."""
    better: Literal["higher", "lower"]
    value: Callable[[Row], float | None]
    error: Callable[[Row], float | None] | None = None
    """One standard error of the value, windows as clusters, where it has one of that kind."""
    column: Column | None = None
    judged: Judged | None = None
    samples: Callable[[Row], list[float]] | None = None
    """The repeats that the value is the median of, where it is one."""
    difference: Callable[[Row, Row], Estimate | None] | None = None
    """The first row's value less the second's, paired by window, where it is a mean over tokens."""
    scored_on: Literal["text", "reference"] | None = None
    """What a number of quality is of: the evaluation's tokens alone, or the base's distributions too."""


def _memory(key: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        return row.measurement.memory.get(key) if row.measurement else None

    return value


def _median(samples: Callable[[Row], list[float]]) -> Callable[[Row], float | None]:
    return lambda row: median(found) if (found := samples(row)) else None


def _load_s(row: Row) -> float | None:
    return row.measurement.load_s if row.measurement else None


def _disk_bytes(row: Row) -> float | None:
    # An artifact that could not be made is stored with no bytes.
    return row.artifact.disk_bytes or None


def _bits_per_weight(row: Row) -> float | None:
    return row.artifact.bits_per_weight or None


def _predicted(row: Row) -> float | None:
    """Of types that were chosen by prices, their sum."""
    choice = row.artifact.provenance.get("choice")
    found = choice.get("divergence") if isinstance(choice, dict) else None
    return found if isinstance(found, float) else None


def _divergence(p: float) -> Callable[[Row], float | None]:
    """The p-quantile over tokens of the divergence from the base."""
    return quality.compared(partial(estimates.divergence_quantile, p=p))


def _estimated(
    estimate: Callable[[Row], Estimate | None],
) -> tuple[Callable[[Row], float | None], Callable[[Row], float | None]]:
    """Value and error of a metric for which they come together."""

    def value(row: Row) -> float | None:
        found = estimate(row)
        return found.value if found else None

    def error(row: Row) -> float | None:
        found = estimate(row)
        return found.se if found else None

    return value, error


METRICS: dict[str, Metric] = {metric.name: metric for metric in (
    Metric("bits_per_weight", "bits per weight", "bit", "lower", _bits_per_weight,
           column=Column("bpw", "bit", ".2f", 1, "Bytes of all weight tensors x 8 over parameters", "always"),
           judged=Judged(10, 0.001, exact=True, nightly=False)),
    Metric("engine_bits_per_weight", "bits per weight in the engine", "bit", "lower", forms.bits_in_engine),
    Metric("disk_bytes", "size", "B", "lower", _disk_bytes,
           column=Column("size", "MiB", ".1f", MIB, printed="always"),
           judged=Judged(9, 0.001, exact=True)),
    Metric("load_s", "load", "s", "lower", _load_s,
           column=Column("load", "s", ".1f", printed="always"),
           judged=Judged(8, 0.25, nightly=False)),
    Metric("peak_rss_bytes", "peak memory", "B", "lower", _memory("peak_rss"),
           column=Column("peak RSS", "MiB", ".0f", MIB, "Of all processes of the engine, on the host", "always"),
           judged=Judged(6, 0.05, plotted=True)),
    Metric("peak_vram_bytes", "peak VRAM", "B", "lower", _memory("peak_vram"),
           column=Column("peak VRAM", "MiB", ".0f", MIB, printed="where measured"),
           judged=Judged(7, 0.05, plotted=True)),
    Metric("weights_bytes", "weights", "B", "lower", _memory("weights")),
    Metric("kv_cache_bytes", "KV cache", "B", "lower", _memory("kv_cache")),
    Metric("workspace_bytes", "workspace", "B", "lower", _memory("workspace")),
    Metric("prefill_tok_s", "prefill", "tok/s", "higher", _median(speeds.prefill_samples),
           column=Column("prefill", "tok/s", ".1f", 1, "Median of {workload}; 95 %", "always"),
           judged=Judged(2, 0.05, plotted=True),
           samples=speeds.prefill_samples),
    Metric("decode_tok_s", "decode", "tok/s", "higher", _median(speeds.decode_samples),
           column=Column("decode", "tok/s", ".1f", 1, "Median of {workload}; 95 %", "always"),
           judged=Judged(1, 0.05, plotted=True),
           samples=speeds.decode_samples),
    Metric("ttft_s", "first token", "s", "lower", _median(speeds.ttft_samples),
           column=Column("first token", "ms", ".1f", 1e-3, "From submitting the prompt, median of the repeats")),
    Metric("itl_p50_s", "between tokens, median", "s", "lower", speeds.itl(0.5)),
    Metric("itl_p95_s", "between tokens, 95 %", "s", "lower", speeds.itl(0.95),
           column=Column("between tokens, 95 %", "ms", ".1f", 1e-3, "95 % of the decoding steps are faster")),
    Metric("itl_p99_s", "between tokens, 99 %", "s", "lower", speeds.itl(0.99)),
    Metric("goodput_req_s", "goodput", "req/s", "higher", loads.goodput,
           column=Column("goodput", "req/s", ".2f", 1, "Requests a second within the limits, at the best load point",
                         "where measured")),
    Metric("largest_rate_req_s", "largest rate", "req/s", "higher", loads.largest_rate,
           column=Column("largest rate", "req/s", ".2f", 1, "At which 95 of 100 requests surely keep the limits",
                         "where measured")),
    Metric("energy_j_per_token", "energy a token", "J", "lower", speeds.energy_j_per_token,
           column=Column("energy", "J/token", ".3f", 1, "Of GPUs, and of processors whose counter can be read")),
    Metric("bandwidth_fraction", "of the copy bandwidth", "", "higher", speeds.bandwidth_fraction,
           column=Column("bandwidth", "%", ".0f", 0.01, "Weights read, of what the machine can copy")),
    Metric("perplexity", "perplexity", "", "lower", quality.perplexity, quality.perplexity_se,
           column=Column("perplexity", "", ".3f", 1, "± one standard error, by windows"),
           judged=Judged(3, 0.005, plotted=True),
           difference=quality.perplexity_delta, scored_on="text"),
    Metric("kld_mean", "KLD", "nat", "lower", *_estimated(quality.compared(estimates.divergence)),
           column=Column("divergence", "nat", ".4f", 1, "Mean KL divergence from the base, a token"),
           judged=Judged(4, 0.10, plotted=True),
           difference=quality.mean_delta("kld_sum", "kld_count"), scored_on="reference"),
    Metric("kld_predicted", "KLD, predicted", "nat", "lower", _predicted,
           column=Column("KLD, predicted", "nat", ".4f", 1, "What the chosen types were expected to cost, on the "
                         "calibration's tokens and in exact arithmetic", "where measured")),
    Metric("kld_p50", "KLD, median", "nat", "lower", _divergence(0.5), scored_on="reference"),
    Metric("kld_p90", "KLD, 90 %", "nat", "lower", _divergence(0.9), scored_on="reference"),
    Metric("kld_p99", "KLD, 99 %", "nat", "lower", _divergence(0.99), scored_on="reference",
           column=Column("divergence, 99 %", "nat", ".3f", 1, "99 % of the tokens have less")),
    Metric("kld_p999", "KLD, 99.9 %", "nat", "lower", _divergence(0.999), scored_on="reference"),
    Metric("kld_max", "KLD, maximum", "nat", "lower", _divergence(1.0), scored_on="reference"),
    Metric("top1_agreement", "same top", "", "higher", *_estimated(quality.compared(estimates.agreement)),
           column=Column("same top", "%", ".2f", 0.01, "Share of tokens whose likeliest one is the base's"),
           judged=Judged(5, 0.005),
           difference=quality.mean_delta("same_top_sum", "kld_count"), scored_on="reference"),
    Metric("rms_dp", "RMS Δp", "", "lower", *_estimated(quality.compared(estimates.rms_dp)), scored_on="reference"),
    Metric("bits_per_byte", "bits per byte", "bit", "lower", *_estimated(quality.bits_per_byte), scored_on="text"),
)}  # fmt: skip

OF_THE_REFERENCE = tuple(name for name, metric in METRICS.items() if metric.scored_on == "reference")
"""The metrics that are about the base's distributions too."""

JUDGED: dict[str, Judged] = dict(
    sorted(
        ((metric.name, metric.judged) for metric in METRICS.values() if metric.judged), key=lambda pair: pair[1].place
    )
)
"""What compare, nights and history judge, in the order in which they tell it."""
