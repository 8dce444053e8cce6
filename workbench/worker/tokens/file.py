"""The token file: windows of token ids, written once a recipe (`windows.py`), so that all engines see the same."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from workbench.disk import write_whole
from workbench.errors import UserError
from workbench.records import from_json, to_json


@dataclass(frozen=True)
class TokenFile:
    """An evaluation or calibration set in token ids."""

    windows: list[list[int]]
    score_from: list[int] = field(default_factory=list)
    """One position a window: positions from it to the last but one are scored, each by the id behind it."""
    vocab_size: int = 0
    bos: int | None = None
    """The id that every window begins with, if the tokenizer adds one."""
    digest: str = ""
    spelling: dict[str, str | None] = field(default_factory=dict)
    """The text of every id that occurs, as the base's tokenizer has it."""


def read_tokens(path: str | Path) -> TokenFile:
    """Raises `UserError` for a file that is not whole, or of another tokenizer than it says."""
    try:
        found: TokenFile = from_json(TokenFile, json.loads(Path(path).read_text(encoding="utf-8")))
        highest = max((max(window, default=0) for window in found.windows), default=0)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole token file ({error}); remove its folder, and it is made anew") from None
    if found.score_from and len(found.windows) != len(found.score_from):
        raise UserError(f"{path}: {len(found.windows)} windows but {len(found.score_from)} score_from; make it anew")
    if found.vocab_size and highest >= found.vocab_size:
        raise UserError(
            f"{path}: token id {highest} is outside its vocabulary of {found.vocab_size}; "
            "make it anew with this tokenizer"
        )
    return found


def write_tokens(path: Path, tokens: TokenFile) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(to_json(tokens), separators=(",", ":")))
