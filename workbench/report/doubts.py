"""What is to be known of a row beside its numbers, and the same said once below a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from workbench.records import Row
from workbench.report import quality
from workbench.report.estimates import Estimate
from workbench.report.metrics import METRICS
from workbench.report.noise import ANOTHER_MODEL_NATS

PREDICTED_FACTORS = (0.5, 2.0)
"""Measured over predicted divergence outside which a prediction is said to err: from one of llama.cpp's mixtures to the
next (Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K) it is a factor of 2.3 to 4.6 in float32 (rows of `recipes/smollm2-135m.yaml`),
so beyond 2 the prediction is of another mixture. Of 36 files of the default model, 10 measured in float32 too, none is
outside: there they diverged 1.12 to 1.46 times as predicted (`benchmarks/predicted_vs_measured.svg`)."""
ROUNDING_INPUTS = ("llamacpp", "llama-server", "llama-cpp-server")
"""Engines that round inputs to 8 bits: llama.cpp by its three names."""
ROUNDED_INPUTS_NATS = 0.025
"""What that may add to a predicted divergence, which is of exact arithmetic, nats a token: llama.cpp added 0.003 (Q8_0)
to 0.023 (Q4_K_M) to what the same files diverged by in float32 (same rows), and 0.003 to 0.032 to the ten files. The
base's own divergence has none of it, for its inputs are not rounded."""
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
"""A number in a sentence; not part of a name (Q4_1), nor of a version with two dots."""


def warnings_of(
    row: Row, values: Mapping[str, float | None], base: Row | None, delta: Estimate | None
) -> tuple[str, ...]:
    """All that makes a row's numbers doubtful, as it was told when it was measured, beside its base, and beside what
    was predicted (`values`: its own by metric, `delta`: the difference of perplexity to the base's)."""
    own = values["perplexity"]
    found = [*row.artifact.warnings, *(row.measurement.warnings if row.measurement else ()), *row.warnings]
    if own is not None and base is None:
        found.append(f"the base has no perplexity on {row.backend}, so there is no delta")
    elif own is not None and base is not None and not quality.same_tokens(row, base):
        found.append(f"the base on {row.backend} was scored on other tokens, so there is no delta")
    elif delta and base is not None and base is not row and (lost := quality.nonfinite(base)):
        found.append(f"the delta leaves out tokens whose logits of the base on {row.backend} are not finite ({lost})")
    if base is not None and (guess := quality.guessing(base)):
        found.append(
            f"the base on {row.backend} has a higher perplexity than guessing among its {guess:,} tokens: it is "
            "broken, was never trained, or knows nothing of such text. Agreeing with it is no merit"
        )
    apart = METRICS["kld_mean"].value(base) if base is not None else None
    if apart is not None and apart > ANOTHER_MODEL_NATS:
        found.append(
            f"{row.backend} runs the base as another model: it differs there from its reference by {apart:.3f} nats "
            f"a token, where arithmetic alone makes less than {ANOTHER_MODEL_NATS:g}. Numbers of quality on "
            f"{row.backend} are that model's"
        )
    found.append(_mispredicted(row, values["kld_predicted"], values["kld_mean"], apart or 0.0))
    return tuple(dict.fromkeys(text for text in found if text))


def _mispredicted(row: Row, predicted: float | None, measured: float | None, apart: float) -> str:
    """Where the divergence that types were chosen for (nats a token) is not the measured one; `apart`: the base's own
    in this engine. A prediction is of exact arithmetic, so an engine's own counts only against one that is too high."""
    if not predicted or measured is None:
        return ""
    low, high = PREDICTED_FACTORS
    allowed = apart + (ROUNDED_INPUTS_NATS if row.backend in ROUNDING_INPUTS else 0.0)
    if low * predicted <= measured <= high * predicted + allowed:
        return ""
    return (
        f"the prediction errs: on {row.backend} this file diverges by {measured:.4f} nats a token, "
        f"{measured / predicted:.2g} times the {predicted:.4f} predicted, as far off as another mixture would be. "
        "Prices were made on the calibration's tokens; go by the measured number"
    )


def quality_missing(row: Row) -> str | None:
    """Why a measured row has no quality, where that is meant: weights that were drawn at random say nothing."""
    if row.measurement is None or row.quality is not None:
        return None
    if (row.artifact.provenance.get("source") or {}).get("config"):
        return "no quality: the base has random weights of a given shape, so only speed and memory mean anything"
    if any(text.startswith("no quality") for text in row.measurement.warnings):
        return None  # Its own note says it.
    if row.measurement.serving is not None and row.evaluation is None:
        return "no quality: of this server only its speed was measured"
    return "no quality: the recipe has no evaluation" if row.evaluation is None else None


def footnotes_of(reasons: Sequence[Sequence[str]]) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
    """Numbers, from 1, for the reasons of each line, and the texts that they stand for: sentences that differ only in
    numbers are one, with the ranges (`equal to 4.6e-04 to 4.8e-04 of the largest`)."""
    alike: dict[str, list[str]] = {}
    for reason in (reason for each in reasons for reason in each):
        alike.setdefault(NUMBER.sub("#", reason), []).append(reason)
    places = {name: number for number, name in enumerate(alike, start=1)}
    marks = [tuple(dict.fromkeys(places[NUMBER.sub("#", reason)] for reason in each)) for each in reasons]
    return marks, tuple(map(_merged, alike.values()))


def _merged(texts: Sequence[str]) -> str:
    """Sentences that are one but for their numbers as that one, with the least and the most of each."""
    found = zip(*map(NUMBER.findall, texts), strict=True)
    ranges = iter([(min(each, key=_value), max(each, key=_value)) for each in found])
    whole = NUMBER.sub(lambda _: " to ".join(dict.fromkeys(next(ranges))), texts[0])
    # Where a sentence has a range itself, that of all is from its least to its most.
    number = NUMBER.pattern
    return re.sub(rf"({number})(?: to {number})+ to ({number})", r"\1 to \2", whole)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
