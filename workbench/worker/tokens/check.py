"""A recipe's texts and tasks, read through where there is no tokenizer yet: what a run would refuse in them."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import UserError
from workbench.records import TextsRequest, from_json
from workbench.worker import Progress
from workbench.worker.tokens.tasks import read
from workbench.worker.tokens.text import Source, read_text, source_of

LONGEST_TOKEN = 16
"""Bytes; no tokenizer takes more than so many for one on the average of a text."""


def check(payload: object, progress: Progress) -> object:
    """Worker for a `TextsRequest`; returns the datasets that were left unread.

    Raises `UserError` for what cannot be read, what is wrong in it, and for a text too short for its windows, as far as
    its bytes tell, or its tokens where there is a tokenizer.
    """
    request: TextsRequest = from_json(TextsRequest, payload)
    unread, texts, evaluated = dict[str, None](), dict[Source, str](), dict[Source, int]()
    counted = dict[Source, int]()
    for each in request.sets:
        source = source_of(each.source)
        if source.dataset:
            unread[str(source)] = None
            continue
        text = texts[source] = texts.get(source) or read_text(source)
        windows = each.windows or 1
        need = each.window + (windows - 1) * (each.stride or each.window)
        used = evaluated.get(source, 0) if each.role == "calibration" else 0
        evaluated[source] = max(evaluated.get(source, 0), need)
        size, unit = len(text.encode()), "bytes"
        # Counting takes longer, and matters to one who needs about so many only.
        if request.tokenizer and used + need <= size < (used + need) * LONGEST_TOKEN:
            if source not in counted:
                counted[source] = _tokens(text, request.tokenizer)
            size, unit = counted[source], "tokens"
        # No tokenizer spends less than a byte on a token, but for a blank that some put before the text.
        if size + (unit == "bytes") < used + need:
            taken = f" beside the evaluation's {used:,}" if used else ""
            raise UserError(
                f"{each.role} '{each.name}': {source} has {size:,} {unit}, and {windows} windows of {each.window} take "
                f"{need:,} tokens{taken}: ask for fewer or shorter ones, or name a longer text"
            )
    for task in request.tasks.values():
        if "file" in task:
            read(Path(task["file"]))
    return list(unread)


def _tokens(text: str, tokenizer: str) -> int:
    """How many it has by that `tokenizer.json`, without special ones."""
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(tokenizer).encode(text, add_special_tokens=False).ids)
