"""What servers tell of a prompt's own tokens: requests whose answers hold their log-probabilities, and the answers.

Two dialects, both of `/completions`, and both with token ids in: vLLM's `prompt_logprobs`, and `echo` with `logprobs`
as OpenAI's API once had it. A server that knows neither may take the request and ignore the word: then its answer has
no log-probability for each token, which is found here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from workbench.serving.faults import Fault

OURS: dict[str, dict[str, Any]] = {"prompt_logprobs": {"prompt_logprobs": 0}, "echo": {"echo": True, "logprobs": 1}}
"""What asks for them beside the prompt, by dialect."""
AS_ID = "token_id:"
"""How vLLM spells a token by its id."""


class Own(NamedTuple):
    """What is told of one token behind those before it."""

    logprob: float
    likeliest: bool
    text: str | None


class Told(msgspec.Struct):
    """Of one id at one place, as vLLM has it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class Logprobs(msgspec.Struct):
    """Of an answer, place by place, as OpenAI's completions had it."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    """An answer with what it tells."""

    prompt_logprobs: list[dict[str, Told] | None] | None = None
    logprobs: Logprobs | None = None


class Completion(msgspec.Struct):
    """The whole of it."""

    choices: list[Choice] = []


def own_tokens(dialect: str, ids: list[int], data: bytes) -> list[Own]:
    """Of every id of a prompt but the first. Raises `Fault` where the answer does not tell them."""
    if dialect == "prompt_logprobs":
        places = (_choice(data).prompt_logprobs or [])[1:]
        told = [(place or {}).get(str(token)) for token, place in zip(ids[1:], places, strict=False)]
        found = [Own(each.logprob, each.rank == 1, each.decoded_token) for each in told if each]
    else:
        echoed = logprobs_of(data)
        tops = echoed.top_logprobs or [None] * len(ids)
        found = [
            Own(value, bool(top) and value >= max(top.values(), default=value), text)
            for value, text, top in zip(
                echoed.token_logprobs[1 : len(ids)], echoed.tokens[1 : len(ids)], tops[1 : len(ids)], strict=False
            )
            if value is not None and top is not None
        ]
    if len(found) != len(ids) - 1:
        raise Fault(f"{len(found)} log-probabilities for a prompt of {len(ids)} tokens")
    return found


def logprobs_of(data: bytes) -> Logprobs:
    """What is told of an answer's tokens, and of those that it echoes. Raises `Fault` for what is no answer."""
    return _choice(data).logprobs or Logprobs()


def next_ids(data: bytes) -> list[tuple[int, float]]:
    """(id, log-probability) of what may come next, from vLLM's answer to `logprobs` with tokens spelt as ids. Raises
    `Fault` for what is none."""
    tops = logprobs_of(data).top_logprobs or [None]
    try:
        return [(int(name.removeprefix(AS_ID)), value) for name, value in (tops[0] or {}).items()]
    except ValueError:
        raise Fault("tokens that are not spelt as ids") from None


def _choice(data: bytes) -> Choice:
    try:
        return next(iter(msgspec.json.decode(data, type=Completion).choices), Choice())
    except (ValueError, RecursionError) as error:
        raise Fault(f"no JSON of this API ({error})") from None
