"""A recipe's texts and tasks, read through where there is no tokenizer yet: what a run would refuse in them."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import UserError
from workbench.records import TextsRequest, from_json
from workbench.worker import Progress
from workbench.worker.tokens.tasks import read
from workbench.worker.tokens.text import Source, read_text, source_of


def check(payload: object, progress: Progress) -> object:
    """Worker for a `TextsRequest`; returns the datasets that were left unread.

    Raises `UserError` for what cannot be read, what is wrong in it, and for a text with fewer bytes than its windows
    have tokens.
    """
    request: TextsRequest = from_json(TextsRequest, payload)
    sizes, unread = dict[Source, int](), dict[str, None]()
    for each in request.sets:
        source = source_of(each.source)
        if source.dataset:
            unread[str(source)] = None
            continue
        if source not in sizes:
            sizes[source] = len(read_text(source).encode())
        windows = each.windows or 1
        need = each.window + (windows - 1) * (each.stride or each.window)
        # No tokenizer spends less than a byte on a token, but for a blank that some put before the text.
        if sizes[source] + 1 < need:
            raise UserError(
                f"{each.role} '{each.name}': {source} has {sizes[source]:,} bytes, and {windows} windows of "
                f"{each.window} take {need:,} tokens: ask for fewer or shorter ones, or name a longer text"
            )
    for task in request.tasks.values():
        if "file" in task:
            read(Path(task["file"]))
    return list(unread)
