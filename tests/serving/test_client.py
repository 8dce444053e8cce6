"""One answer over HTTP: what is counted, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.serving.fake_server import Fake, fake_server
from workbench.serving import client
from workbench.serving.address import address_of
from workbench.serving.client import Answer, Client, Dialect, Wanted
from workbench.serving.faults import Busy, Gone

WANTED = Wanted("some words that are a prompt", 8, 6)


def asked(fake: Fake, dialect: Dialect | None = None, wanted: Wanted = WANTED, key: str = "", **more: Any) -> Answer:
    async def ask() -> Answer:
        async with Client(address_of(fake.url, "KEY" if key else None, {"KEY": key}), **more) as client:
            return await client.stream(dialect or Dialect("toy", "toy"), wanted)

    return asyncio.run(ask())


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("a_chunk", [1, 4])
@pytest.mark.parametrize(
    ("ids", "usage", "how"), [(True, True, "ids"), (False, True, "usage"), (False, False, "length")]
)
def test_tokens_are_counted_and_not_chunks(api: Any, a_chunk: int, ids: bool, usage: bool, how: str) -> None:
    with fake_server(ids=ids, usage=usage, a_chunk=a_chunk) as fake:
        answer = asked(fake, Dialect("toy", "toy", api))
    assert (answer.request.error, answer.how, answer.request.new_tokens) == ("", how, 6)
    assert answer.request.gained == ([1] * 6 if a_chunk == 1 else [4, 2] if ids else [3, 3])
    assert answer.request.first_token_s and len(answer.request.gaps_s) == len(answer.request.gained) - 1
    assert answer.request.prompt_tokens == (8 if usage else WANTED.prompt_tokens)
    assert answer.request.end_s >= answer.request.first_token_s + sum(answer.request.gaps_s) - 1e-5


def test_a_prompt_of_ids() -> None:
    with fake_server() as fake:
        assert asked(fake, wanted=Wanted([5, 6, 7], 3, 4)).request.prompt_tokens == 3
        assert fake.asked[-1]["prompt"] == [5, 6, 7]


def test_a_character_cut_in_two_by_the_network_is_whole() -> None:
    with fake_server(faults={-1: "cut character"}) as fake:
        assert asked(fake).request.new_tokens == 6


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stall", "no token for 0.2 s after 3 pieces"),
        ("reset", "the connection ended after 3 pieces"),
        ("end", "closed after 3 pieces"),
        ("garbage", "no JSON of this API"),
        ("not utf-8", "not UTF-8"),
        ("error inside", "out of memory"),
        ("other model", "answers as another model: another"),
        ("doubled", "12 token ids came, its usage counts 6"),
        ("wrong usage", "6 token ids came, its usage counts 18"),
        ("status 500", "status 500"),
    ],
)
def test_a_fault_is_told_with_what_had_come(fault: str, words: str) -> None:
    with fake_server(faults={-1: fault}) as fake:
        answer = asked(fake, first_s=2.0, silent_s=0.2)
    assert words in answer.request.error and answer.how is None
    assert isinstance(answer.fault, Gone) is (fault in ("stall", "reset", "end"))
    if fault in ("stall", "reset", "end"):
        assert len(answer.request.gained) == 3


@pytest.mark.parametrize(
    ("fault", "words"), [("doubled", "12 pieces of text, 6 tokens"), ("wrong usage", "18 tokens by its own count")]
)
def test_counts_that_contradict_themselves_without_ids(fault: str, words: str) -> None:
    with fake_server(ids=False, faults={-1: fault}) as fake:
        assert words in asked(fake).request.error


def test_an_answer_that_is_broken_off_for_the_next_says_so() -> None:
    with fake_server(ids=False, usage=False, faults={-1: "broken off"}) as fake:
        error = asked(fake).request.error
    assert "broken off after 3 pieces" in error and "--interrupt_requests false" in error


def test_answers_that_only_their_length_counts_are_asked_to_have_it() -> None:
    with fake_server(ids=False, usage=False, ends_after=3) as fake:
        assert "neither ids nor usage" in asked(fake).request.error
        answer = asked(fake, Dialect("toy", "toy", by_length=True))
        assert (answer.how, answer.request.new_tokens) == ("length", 6)
        assert fake.asked[-1]["min_tokens"] == 6 and "min_tokens" not in fake.asked[0]


def test_a_stream_is_read_in_pieces_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of asyncio's quarter of a megabyte, for which memory is mapped anew with each token."""
    pieces, set_to = [], client._read_little

    def read_little(reply: Any) -> None:
        pieces.append(reply.connection.transport.max_size)
        set_to(reply)
        pieces.append(reply.connection.transport.max_size)

    monkeypatch.setattr(client, "_read_little", read_little)
    with fake_server() as fake:
        assert asked(fake).request.new_tokens == 6
    assert pieces == [1 << 18, client.READ_BYTES] and client.READ_BYTES < 1 << 17


def test_no_first_token_in_time() -> None:
    with fake_server(first_s=5.0) as fake:
        assert "no token for 0.1 s after 0 pieces" in asked(fake, first_s=0.1).request.error


def test_a_busy_server_is_no_gone_one() -> None:
    with fake_server(faults={-1: "status 429"}) as fake:
        answer = asked(fake)
    assert isinstance(answer.fault, Busy) and "429" in answer.request.error


def test_answers_from_a_cache_are_refused() -> None:
    with fake_server(cached=7) as fake:
        assert "7 of 8 prompt tokens came from a cache" in asked(fake).request.error
    with fake_server(first_s=0.0) as fake:

        async def fast() -> Answer:
            async with Client(address_of(fake.url)) as client:
                client.least_s_per_token = 1.0
                return await client.stream(Dialect("toy", "toy"), WANTED)

        assert "from a cache" in asyncio.run(fast()).request.error


def test_nobody_listens() -> None:
    with fake_server() as fake:
        pass
    answer = asked(fake)
    assert isinstance(answer.fault, Gone) and "nobody listens" in answer.request.error


def test_the_key_is_sent_and_never_told() -> None:
    with fake_server(key="sk-secret", faults={0: "status 400"}) as fake:
        told = asked(fake, key="sk-secret")
        assert "status 400" in told.request.error
        assert asked(fake, key="sk-secret").request.new_tokens == 6
        wrong = asked(fake, key="sk-other")
        assert wrong.request.error == "status 401"
        assert "sk-" not in repr(address_of(fake.url, "KEY", {"KEY": "sk-secret"}))


def test_a_key_does_not_follow_a_redirect() -> None:
    with fake_server() as other, fake_server(elsewhere=f"{other.url}/completions") as fake:
        assert "status 307" in asked(fake, key="sk-secret").request.error
        assert not other.headers
