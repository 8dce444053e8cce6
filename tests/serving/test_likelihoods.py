"""What servers tell of log-probabilities, read."""

from __future__ import annotations

import json

import pytest

from workbench.serving.faults import Fault
from workbench.serving.likelihoods import Own, next_ids, own_tokens


def answer(**choice: object) -> bytes:
    return json.dumps({"choices": [{"text": "", **choice}]}).encode()


def test_vllms_own_way() -> None:
    told = [None, {"7": {"logprob": -0.25, "rank": 1, "decoded_token": " a"}}, {"9": {"logprob": -3.5, "rank": 4}}]
    found = own_tokens("prompt_logprobs", [5, 7, 9], answer(prompt_logprobs=told))
    assert found == [Own(-0.25, True, " a"), Own(-3.5, False, None)]
    with pytest.raises(Fault, match="1 log-probabilities for a prompt of 3 tokens"):
        own_tokens("prompt_logprobs", [5, 7, 8], answer(prompt_logprobs=told))


def test_echo() -> None:
    told = {
        "tokens": ["x", " a", "b", "answer"],
        "token_logprobs": [None, -0.25, -3.5, -1.0],
        "top_logprobs": [None, {" a": -0.25}, {"c": -0.1, "b": -3.5}, {}],
    }
    found = own_tokens("echo", [5, 7, 9], answer(logprobs=told))
    assert found == [Own(-0.25, True, " a"), Own(-3.5, False, "b")]


@pytest.mark.parametrize(
    "data",
    [
        answer(),
        answer(logprobs=None),
        # `echo` taken and ignored: of the answer's own token alone.
        answer(logprobs={"tokens": ["z"], "token_logprobs": [-1.0], "top_logprobs": [{"z": -1.0}]}),
        b'{"choices": []}',
        b"<html>",
        b'{"choices": [{"logprobs": {"token_logprobs": "many"}}]}',
    ],
)
@pytest.mark.parametrize("dialect", ["echo", "prompt_logprobs"])
def test_answers_that_tell_nothing(dialect: str, data: bytes) -> None:
    with pytest.raises(Fault):
        own_tokens(dialect, [5, 7, 9], data)


def test_all_that_may_come_next() -> None:
    assert next_ids(answer(logprobs={"top_logprobs": [{"token_id:3": -0.5, "token_id:0": -1.0}]})) == [
        (3, -0.5),
        (0, -1.0),
    ]
    assert next_ids(answer()) == []
    with pytest.raises(Fault, match="not spelt as ids"):
        next_ids(answer(logprobs={"top_logprobs": [{" the": -0.5}]}))
