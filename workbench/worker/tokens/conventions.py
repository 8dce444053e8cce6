"""Scoring conventions: where a text's windows begin, and from which position of each on it is scored.

Position p of a window is scored by how well it predicts token p + 1; the last has nothing to predict. A convention
is one function and one entry in `CONVENTIONS`; the entry's key is the recipe's word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Spans = list[tuple[int, int]]
"""(first token, first scored position of the window) of every window that fits."""


def second_half(tokens: int, window: int, stride: int) -> Spans:
    """Independent windows scored from half on, as llama.cpp does: every scored token has half a window of context."""
    return [(start, window // 2) for start in range(0, tokens - window + 1, window)]


def whole(tokens: int, window: int, stride: int) -> Spans:
    """Independent windows, all of it, as papers do."""
    return [(start, 0) for start in range(0, tokens - window + 1, window)]


def strided(tokens: int, window: int, stride: int) -> Spans:
    """Windows that overlap: the first is scored whole, each later one in its last `stride` tokens, which are new."""
    # The position before each token predicts it.
    return [(start, window - stride - 1 if start else 0) for start in range(0, tokens - window + 1, stride)]


class Convention(NamedTuple):
    """`spans(tokens, window, stride)`; `stride` says whether it takes one (from 1 to the window less one), else 0."""

    spans: Callable[[int, int, int], Spans]
    stride: bool = False


CONVENTIONS = {
    "second-half": Convention(second_half),
    "all": Convention(whole),
    "strided": Convention(strided, stride=True),
}
DEFAULT = "second-half"
