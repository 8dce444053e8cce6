"""What is to be known of a row beside its numbers, and the same said once below a table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from workbench.records import Row
from workbench.report import quality
from workbench.report.estimates import Estimate
from workbench.report.metrics import METRICS

ANOTHER_MODEL_NATS = 0.02
"""Mean divergence of the base from its own reference from which an engine is said to run another model: bfloat16 costs
up to 0.001 nats a token, a sliding window or a rope scaling that is left out 0.1 to 2."""
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
"""A number in a sentence; not part of a name (Q4_1), nor of a version with two dots."""


def warnings_of(row: Row, own: float | None, base: Row | None, delta: Estimate | None) -> tuple[str, ...]:
    """All that makes a row's numbers doubtful, as it was told when it was measured, and beside its base (`own`: its
    perplexity, `delta`: the difference to the base's)."""
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
    return tuple(dict.fromkeys(text for text in found if text))


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
    return NUMBER.sub(lambda _: " to ".join(dict.fromkeys(next(ranges))), texts[0])


def _value(number: str) -> float:
    return float(number.replace(",", ""))
