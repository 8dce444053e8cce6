"""What llama-server answers to its own requests (`/completion`, `/tokenize`), as far as it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

BODY = {"temperature": 0.0, "cache_prompt": True, "id_slot": 0}
"""Of its own requests: the likeliest token, one slot, what it has of the prefix kept."""
FORCED = 1000.0
"""Added to the logit of a token that is text by itself, so that it is taken: of halves of characters the server tells
nothing. What it tells of all tokens is of the logits as they were."""
Post = Callable[[str, object], bytes]
"""What it answers at a path of its root."""


class Likely(msgspec.Struct):
    """A token that may come next."""

    id: int
    logprob: float
    token: str = ""


class Place(msgspec.Struct):
    """All that may stand at one place of the answer."""

    top_logprobs: list[Likely] = []


class Completed(msgspec.Struct):
    """An answer: its tokens, and what else might have come."""

    tokens: list[int] = []
    completion_probabilities: list[Place] = []


class Tokenized(msgspec.Struct):
    """A text's tokens."""

    tokens: list[int]


Kind = TypeVar("Kind")


def plain_token(post: Post) -> int:
    """A token that is text by itself. Raises `RuntimeError`."""
    return tokenized(post("/tokenize", {"content": "a"})).tokens[-1]


def likely_next(post: Post, prefix: list[int], plain: int, whole: bool = False) -> list[Likely]:
    """All tokens of the vocabulary behind a prefix, of which the token `plain` is taken. `whole`: the prefix is
    computed anew, in one piece. Raises `RuntimeError`."""
    asked = BODY | {"prompt": prefix, "n_predict": 1, "n_probs": 1 << 20, "logit_bias": [[plain, FORCED]]}
    found = completed(post("/completion", asked | {"cache_prompt": not whole}))
    return found.completion_probabilities[0].top_logprobs if found.completion_probabilities else []


def completed(data: bytes) -> Completed:
    """An answer of `/completion`. Raises `RuntimeError` for what is none."""
    return _decoded(data, Completed)


def tokenized(data: bytes) -> Tokenized:
    """An answer of `/tokenize`. Raises `RuntimeError` for what is none."""
    return _decoded(data, Tokenized)


def _decoded(data: bytes, kind: type[Kind]) -> Kind:
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"no answer of llama-server's kind ({error}): {data[:100]!r}") from None
