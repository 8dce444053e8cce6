"""Whether a variant's tokenizer spells as the base's does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from workbench.errors import UserError

OTHERWISE = 20
"""One token in so many may be spelt otherwise by a variant's tokenizer before it counts as another one."""


# --- whose tokens -------------------------------------------------------------------------------


def check_spelling(
    ours: dict[str, str | None], spell: Callable[[list[int]], list[str | None] | None], variant: str
) -> None:
    """Refuse a variant whose own tokenizer gives the ids of an evaluation other meanings than the base's.

    `spell(ids)` says what the ids are in the variant's vocabulary (None for one, or for all, where it cannot be told).
    Formats write a few tokens in ways of their own (bytes, added ones), so only more than one in `OTHERWISE` counts.
    """
    theirs = spell([int(token) for token in ours]) if ours else None
    if theirs is None:
        return
    pairs = [(token, a, b) for (token, a), b in zip(ours.items(), theirs, strict=True) if b is not None]
    other = [pair for pair in pairs if pair[1] != pair[2]]
    if len(other) * OTHERWISE > len(pairs):
        token, a, b = other[0]
        raise UserError(
            f"{variant} has another tokenizer than the base: {len(other)} of {len(pairs)} ids of the evaluation mean "
            f"something else (id {token}: {a!r} in the base, {b!r} here), so its perplexity is not comparable. "
            "Make the variant from this base"
        )


def checkpoint_spelling(folder: str, ids: list[int]) -> list[str | None] | None:
    """What ids are in the vocabulary of a Hugging Face directory's `tokenizer.json`; None if it has none to read."""
    try:
        stored = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = stored["model"]["vocab"]
        # Unigram models have pairs of piece and score in the order of their ids.
        names = dict(enumerate(p for p, _ in vocabulary)) if isinstance(vocabulary, list) else {}
        names |= {token: name for name, token in vocabulary.items()} if isinstance(vocabulary, dict) else {}
        names |= {entry["id"]: entry["content"] for entry in stored.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [names.get(token) for token in ids]
