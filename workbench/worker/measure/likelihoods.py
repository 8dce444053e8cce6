"""Log-likelihoods of given continuations, through an engine's own scoring."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from workbench.errors import install_with


def log_likelihoods(
    engine: Any, asked: list[tuple[list[int], int]], vocab_size: int
) -> list[tuple[float | None, bool]]:
    """(sum of the log-probabilities of the ids behind position `first`, whether each was the likeliest) for every
    window and `first`; None where one of them is not finite. By the scoring that perplexity is measured with."""
    # Windows of equal ids are asked once: a choice may stand twice, and the harness asks the same in two ways.
    unique = {(tuple(ids), first): None for ids, first in asked}
    windows = [(i, list(ids), first) for i, (ids, first) in enumerate(unique)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "windows.json"
        content = {
            "windows": [ids for _, ids, _ in windows],
            "score_from": [first for _, _, first in windows],
            "vocab_size": vocab_size,
        }
        path.write_text(json.dumps(content), encoding="utf-8")
        found = engine.score(windows, {"windows": str(path), "per_token": False, "greedy": True})["windows"]
    sums = [(None if one["nonfinite"] else -one["nll_sum"], one["greedy_sum"] == one["count"]) for one in found]
    place = {key: i for i, key in enumerate(unique)}
    return [sums[place[tuple(ids), first]] for ids, first in asked]


def decoder_of(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise install_with("tokenizers, which spells answers out,", "pip install tokenizers") from None
    return Tokenizer.from_file(str(path))
