"""Whether a variant's tokenizer spells as the base's does."""

from __future__ import annotations

import functools
import json
import re
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


def as_spelt(piece: str | None, text: str | None) -> str | None:
    """`piece`, as a vocabulary has it, if that is what a server's `text` of the id spells; else the text. None where it
    cannot be told: of half a character, and of a token that is told as nothing."""
    if piece is None or not text or "\ufffd" in text:
        return None
    # A blank before a word is lost where a word is spelt alone.
    meant = {piece, piece.replace("\u2581", " "), _of_bytes(piece)}
    return piece if text.strip() in {each.strip() for each in meant} else text


def _of_bytes(piece: str) -> str:
    """What a piece that stands for bytes spells, as SentencePiece's `<0x2C>` or in the letters of GPT-2's vocabulary;
    any other as it is."""
    if one := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(one[1]).decode(errors="replace")
    letters = _byte_letters()
    if not all(letter in letters for letter in piece):
        return piece
    return bytes(letters[letter] for letter in piece).decode(errors="replace")


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Printable bytes of Latin-1 are their own letters; the others, in order, are those from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


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
