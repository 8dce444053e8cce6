"""What scoring counts, as plain dictionaries: a history has ten thousands of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict

from workbench.records.limits import Count, Nats, Number, Size


class WindowScores(TypedDict, total=False):
    """What `worker/scoring/reducer.py` counts in one window; `kld_*`, `same_top*` and `dp*` only where the base's
    reference was compared with."""

    count: Required[Count]
    """Tokens with finite logits, which all sums are over."""
    nonfinite: Required[Count]
    nll_sum: Required[Nats]
    kld_count: Count
    """Tokens for which the base too had finite logits."""
    kld_sum: Nats
    kld_low_sum: Nats
    """Its lower bound that no sampling enters."""
    same_top_sum: Count
    dp_square_sum: Size
    greedy_sum: Count
    """Tokens that were the likeliest, where that was asked for."""
    nll: bytes | list[Nats | None]
    """A value a token, None for one whose logits are not finite; in a row float16 (`reducer.compact`), which is base64
    in JSON."""
    kld: bytes | list[Nats | None]
    same_top: list[Count | None]
    dp: list[Number | None]
    """The correct token's probability less the base's."""


class Quality(TypedDict, total=False):
    """What was measured on an evaluation set; JSON as it is, since a history holds 10,000 of them."""

    windows: Required[list[WindowScores]]
    top_k: Count | None
    tail_draws: Count | None
    reference_digest: str | None
    vocab_size: Count
    made_reference_digest: str | None


class Answers(TypedDict, total=False):
    """How a task was answered."""

    correct: Required[Sequence[Number]]
    """1 or 0 an item, in the order of the task's file, or the harness's own score."""
    given: Sequence[object]
    metric: str
    """By which the harness judged."""
    warnings: list[str]


COMPARED = frozenset({"kld_count", "kld_sum", "same_top_sum", "dp_square_sum"})
"""What every window has, or none."""
FINITE = bytes(high for high in range(256) if high & 0x7C != 0x7C)
"""Higher bytes of finite float16 numbers."""


def check_quality(name: str, quality: Quality) -> None:
    """Raises `ValueError` where windows of the evaluation set `name` contradict themselves."""
    windows = quality["windows"]
    if {len(COMPARED & window.keys()) for window in windows} not in (set(), {0}, {len(COMPARED)}):
        raise ValueError(f"qualities.{name}: sums of a comparison are missing")
    for place, window in enumerate(windows):
        count, compared = window["count"], window.get("kld_count", 0)
        tokens = count + window["nonfinite"]
        lists = [(window.get("nll"), count), (window.get("kld"), compared)]
        if (
            compared > count
            or max(window.get("same_top_sum", 0), window.get("dp_square_sum", 0) * 0.999) > compared
            or any(values is not None and _sizes(values) != (tokens, finite) for values, finite in lists)
        ):
            raise ValueError(f"qualities.{name}.windows[{place}]: its counts contradict each other")


def _sizes(values: bytes | Sequence[float | None]) -> tuple[float, int]:
    """How many values there are, and how many are finite."""
    if isinstance(values, bytes):
        return len(values) / 2, len(values) // 2 - len(values[1::2].translate(None, FINITE))
    return len(values), len(values) - values.count(None)
