"""Prompts: real text, of given lengths, never one twice."""

from __future__ import annotations

import asyncio

import pytest

from workbench.serving.faults import Fault
from workbench.serving.prompts import Prompts, characters_for, wanted_of


def test_no_two_prompts_begin_alike() -> None:
    prompts, other = Prompts(0), Prompts(0)
    assert prompts.run != other.run
    texts = [each.text(400) for each in [prompts] * 300 + [other] * 300]
    assert len({text[:12] for text in texts}) == 600 and {len(text) for text in texts} == {400}
    assert Prompts(1, "x").text(80) == Prompts(1, "x").text(80) != Prompts(2, "x").text(80)
    assert len(Prompts(0).text(3_000_000)) == 3_000_000, "longer than the text there is"


@pytest.mark.parametrize(("a_token", "template"), [(2.0, 0), (3.7, 25), (6.0, 3), (1.0, 90)])
@pytest.mark.parametrize("tokens", [32, 512, 20_000])
def test_a_length_in_tokens_is_found_by_asking(a_token: float, template: int, tokens: int) -> None:
    async def count(text: str) -> int:
        return template + round(len(text) / a_token)

    if tokens < template:
        return
    characters = asyncio.run(characters_for(Prompts(0), tokens, count))
    assert template + characters / a_token == pytest.approx(tokens, rel=0.03, abs=1)


def test_a_server_that_counts_no_prompts() -> None:
    async def count(text: str) -> int:
        return 0

    with pytest.raises(Fault, match="does not count"):
        asyncio.run(characters_for(Prompts(0), 100, count))


def test_requests_of_given_answers() -> None:
    wanted = wanted_of(Prompts(0), 100, 25, [3, 5])
    assert [(each.prompt_tokens, each.new_tokens, len(each.prompt)) for each in wanted] == [(25, 3, 100), (25, 5, 100)]
