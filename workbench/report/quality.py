"""What a row says of quality: the statistics of `estimates.py` on what its worker counted, alone or next to another.

Two rows are compared only where they were scored on the same tokens, and divergences only where they are from one
reference of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from workbench.records import Quality, Row
from workbench.report import estimates
from workbench.report.estimates import Count, Estimate, Total

Found = TypeVar("Found")


class Noise(NamedTuple):
    """How far engines alone move one base, each of which saw the same tokens; None where that is not known."""

    perplexity: float | None = None
    divergence: float | None = None
    """Nats a token."""


def perplexity(row: Row) -> float | None:
    """exp(mean negative log-likelihood) over the scored tokens with finite logits."""
    quality = _scored(row)
    return estimates.perplexity(quality).value if quality else None


def guessing(row: Row) -> int | None:
    """The vocabulary's size where guessing among it would have a lower perplexity than the row; else None."""
    found, size = perplexity(row), row.quality.get("vocab_size") if row.quality else None
    return size if found and size and found > size else None


def perplexity_se(row: Row) -> float | None:
    """Standard error of the perplexity, windows as clusters; None for fewer than two windows."""
    quality = _scored(row)
    return estimates.perplexity(quality).se if quality else None


def perplexity_delta(row: Row, base: Row) -> Estimate | None:
    """The row's perplexity minus the base's, paired over the tokens finite in both, with the error of the
    difference. None if either was not scored, or not on the same tokens."""
    quality, base_quality = _scored(row), _scored(base)
    if quality is None or base_quality is None or not same_tokens(row, base):
        return None
    try:
        return estimates.perplexity_delta(quality, base_quality)
    except ValueError:  # no token that is finite in both
        return None


def bits_per_byte(row: Row) -> Estimate | None:
    """Bits a byte of the scored text; None if it was not scored, or its bytes were not counted."""
    quality = _scored(row)
    if quality is None or row.evaluation is None or not row.evaluation.scored_bytes:
        return None
    return estimates.bits_per_byte(quality, row.evaluation.scored_bytes)


def compared(statistic: Callable[[Quality], Found | None]) -> Callable[[Row], Found | None]:
    """A statistic of how a row differs from the base; None for a row that was compared with none."""

    def value(row: Row) -> Found | None:
        quality = _compared(row)
        return statistic(quality) if quality else None

    return value


def mean_delta(total: Total, count: Count) -> Callable[[Row, Row], Estimate | None]:
    """Change of a mean over the compared tokens, the first row's less the second's, where their reference is one."""

    def difference(row: Row, base: Row) -> Estimate | None:
        quality, base_quality = _scored(row), _scored(base)
        if quality is None or base_quality is None or not same_tokens(row, base) or reference(row) != reference(base):
            return None
        return estimates.mean_delta(quality, base_quality, total, count)

    return difference


divergence_delta = mean_delta("kld_sum", "kld_count")
"""Mean divergence of the first row less the second's, nats a token."""


def alike(row: Row, other: Row, noise: Noise) -> bool | None:
    """Whether the quality of two rows cannot be told apart; None where it is not known.

    Their paired divergences are asked first, where both were compared with one reference, then their paired
    perplexities: a variant far from the base may have its perplexity by luck. Alike is a difference that engines alone
    make, or in whose 95 % interval (Student's t over the windows) zero lies.
    """
    found = [_alike(difference, spread) for difference, spread in _differences(row, other, noise)]
    return False if False in found else None if None in found or not found else True


def worse(row: Row, other: Row, noise: Noise) -> bool:
    """Whether the quality of a row is worse than another's, by the first of the two that tells them apart."""
    told = [each for each, spread in _differences(row, other, noise) if not _alike(each, spread)]
    return bool(told) and told[0].value > 0


def _differences(row: Row, other: Row, noise: Noise) -> list[tuple[Estimate, float | None]]:
    found = (divergence_delta(row, other), noise.divergence), (perplexity_delta(row, other), noise.perplexity)
    return [(difference, spread) for difference, spread in found if difference is not None]


def _alike(difference: Estimate, spread: float | None) -> bool | None:
    interval = estimates.interval(difference)
    if (spread is not None and abs(difference.value) <= spread) or (interval and interval[0] <= 0 <= interval[1]):
        return True
    return False if spread is not None and interval else None


def task_accuracy(row: Row, name: str) -> Estimate | None:
    """Share of a task's items that were right; None if the row was not asked."""
    return estimates.accuracy(_correct(row, name))


def task_interval(row: Row, name: str) -> tuple[float, float] | None:
    """95 % interval of a task's accuracy; None if the row was not asked."""
    correct = _correct(row, name)
    return estimates.share_interval(correct) if correct else None


def task_delta(row: Row, base: Row, name: str) -> tuple[Estimate, tuple[float, float]] | None:
    """The row's accuracy less the base's, paired by item, and its 95 % interval; None if not both were asked the
    same."""
    own, other = _correct(row, name), _correct(base, name)
    task, base_task = row.tasks.get(name), base.tasks.get(name)
    if task is None or base_task is None or task.digest != base_task.digest or len(own) != len(other):
        return None
    delta = estimates.accuracy_delta(own, other)
    return (delta, estimates.share_delta_interval(own, other)) if delta else None


def same_tokens(row: Row, base: Row) -> bool:
    """Whether both were scored on one evaluation, window by window alike."""
    if not _same_text(row, base):
        return False
    sizes, base_sizes = (
        [window["count"] + window["nonfinite"] for window in (quality["windows"] if quality else [])]
        for quality in (_scored(row), _scored(base))
    )
    return sizes == base_sizes


def _same_text(row: Row, other: Row) -> bool:
    own, its = row.evaluation, other.evaluation
    return own is not None and its is not None and own.digest == its.digest


def reference(row: Row) -> str | None:
    """The digest of the base's distributions that the row was compared with; None if it was with none.

    Divergences from two references, even of one base, are not comparable.
    """
    return row.quality.get("reference_digest") if row.quality else None


def nonfinite(row: Row) -> int | None:
    """Scored tokens whose logits were not finite; they are in no other number. None if not scored."""
    return estimates.nonfinite(row.quality) if row.quality else None


def lost_tokens(row: Row, others: Iterable[Row]) -> str | None:
    """Why a row's quality is of fewer tokens than that of others on the same text, in words; None where it is not: what
    is left of it says nothing of the tokens that it cannot do."""
    own = nonfinite(row)
    if not own or not row.quality:
        return None
    same = [other.quality for other in others if other.quality and _same_text(row, other)]
    least = min(map(estimates.nonfinite, same), default=0)
    words = f"{own:,} of {estimates.scored_tokens(row.quality):,} scored tokens have NaN or infinite logits"
    return words + (f" (elsewhere {least:,})" if least else "") if own > least else None


def _scored(row: Row) -> Quality | None:
    """What the worker found, if it scored a single token."""
    quality = row.quality
    return quality if quality and any(window["count"] for window in quality["windows"]) else None


def _compared(row: Row) -> Quality | None:
    """What the worker found, if it compared a single token with the base's distribution."""
    quality = _scored(row)
    return quality if quality and any(window.get("kld_count") for window in quality["windows"]) else None


def _correct(row: Row, name: str) -> list[float]:
    found = row.measurement.tasks.get(name) if row.measurement else None
    return list(found["correct"]) if found else []
