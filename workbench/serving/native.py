"""What llama-server answers to its own requests (`/completion`, `/tokenize`), as far as it is asked for."""

from __future__ import annotations

from typing import TypeVar

import msgspec


class Likely(msgspec.Struct):
    """A token that may come next."""

    id: int
    logprob: float


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
