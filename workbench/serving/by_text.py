"""What llama_cpp.server tells of token ids, which it takes as text alone: by a text that it reads as these ids.

Not every window has such a text. One that begins or ends inside a character has none; one that begins inside a word
becomes other tokens where a tokenizer puts a blank before every text, as SentencePiece's does.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from workbench.serving.faults import Fault
from workbench.serving.likelihoods import Own, logprobs_of
from workbench.serving.native import tokenized

ECHO = {"echo": True, "logprobs": 1}
Post = Callable[[str, object], bytes]
"""What it answers at a path of its root."""


class Otherwise(RuntimeError):
    """The text of some ids is others to the server."""


class Text(msgspec.Struct):
    """Some tokens' text."""

    text: str


def text_of(post: Post, ids: list[int]) -> str:
    """A text that is these ids to the server. Raises `Otherwise` where there is none, and `Fault`."""
    try:
        text = msgspec.json.decode(post("/extras/detokenize", {"tokens": ids}), type=Text).text
    except ValueError as error:
        raise Fault(f"no text of {len(ids)} tokens ({error})") from None
    again = tokenized(post("/extras/tokenize", {"input": text})).tokens
    if again != ids:
        other = (place for place, pair in enumerate(zip(ids, again, strict=False)) if pair[0] != pair[1])
        place = next(other, min(len(ids) - 1, len(again)))
        raise Otherwise(
            f"the server takes text alone, and reads that of a window otherwise: token {place + 1} of {len(ids)} is "
            "another to it"
        )
    return text


def echoed(ids: list[int], data: bytes) -> list[Own | None]:
    """Of every id but the first, which is the mark of a text's beginning and is not echoed; None for the second, of
    which nothing is told. Raises `Fault` where the answer does not tell them."""
    told = logprobs_of(data)
    values = zip(told.tokens, told.token_logprobs, told.top_logprobs or [], strict=False)
    found = [
        None if value is None or top is None else Own(value, value >= max(top.values(), default=value), text)
        for text, value, top in values
    ][: len(ids) - 1]
    if len(found) != len(ids) - 1 or None in found[1:]:
        raise Fault(f"{len(found)} log-probabilities for a text of {len(ids)} tokens")
    return found
