"""What llama_cpp.server tells of a text, read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from workbench.serving.by_text import Otherwise, echoed, text_of
from workbench.serving.faults import Fault
from workbench.serving.likelihoods import Own


def answer(values: list[float | None], tokens: str) -> bytes:
    tops = [None if value is None else {"!": -0.5} for value in values]
    told = {"tokens": list(tokens), "token_logprobs": values, "top_logprobs": tops}
    return json.dumps({"choices": [{"text": "", "logprobs": told}]}).encode()


def test_what_is_echoed_begins_behind_the_mark_of_a_texts_beginning() -> None:
    found = echoed([1, 5, 7, 9], answer([None, -0.25, -3.5, -1.0], "abcd"))
    assert found == [None, Own(-0.25, True, "b"), Own(-3.5, False, "c")]


@pytest.mark.parametrize(
    "data", [answer([None, -0.25], "ab"), answer([None, None, -1.0], "abc"), b'{"choices": []}', b"<html>"]
)
def test_what_tells_less_is_refused(data: bytes) -> None:
    with pytest.raises(Fault):
        echoed([1, 5, 7, 9], data)


def test_a_text_is_taken_for_ids_that_it_is_read_as_alone() -> None:
    reads = {"fox": [1, 40, 41]}

    def post(path: str, body: Any) -> bytes:
        if path == "/extras/detokenize":
            return b"<html>" if 99 in body["tokens"] else b'{"text": "fox"}'
        return json.dumps({"tokens": reads[body["input"]]}).encode()

    assert text_of(post, [1, 40, 41]) == "fox"
    with pytest.raises(Otherwise, match="token 2 of 2 is another"):
        text_of(post, [1, 42])
    with pytest.raises(Otherwise, match="token 4 of 4 is another"):
        text_of(post, [1, 40, 41, 42])
    with pytest.raises(Fault, match="no text of 2 tokens"):
        text_of(post, [1, 99])
