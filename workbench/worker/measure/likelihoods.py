"""Log-likelihoods of given continuations, through an engine's own scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.errors import importing
from workbench.worker.scoring.reducer import Scoring
from workbench.worker.tokens.file import TokenFile


def log_likelihoods(
    engine: Any, asked: list[tuple[list[int], int]], vocab_size: int
) -> list[tuple[float | None, bool]]:
    """(sum of the log-probabilities of the ids behind position `first`, whether each was the likeliest) for every
    window and `first`; None where one of them is not finite. By the scoring that perplexity is measured with."""
    # Windows of equal ids are asked once: a choice may stand twice, and the harness asks the same in two ways.
    unique = {(tuple(ids), first): None for ids, first in asked}
    tokens = TokenFile([list(ids) for ids, _ in unique], [first for _, first in unique], vocab_size)
    found = engine.score(Scoring(tokens, per_token=False, greedy=True), lambda _: None)["windows"]
    sums = [(None if one["nonfinite"] else -one["nll_sum"], one["greedy_sum"] == one["count"]) for one in found]
    place = {key: i for i, key in enumerate(unique)}
    return [sums[place[tuple(ids), first]] for ids, first in asked]


def decoder_of(path: Path) -> Any:
    with importing("tokenizers, which spells answers out,", "pip install tokenizers"):
        from tokenizers import Tokenizer
    return Tokenizer.from_file(str(path))
