"""Prompts of real text and of given lengths, none of which a server has seen.

The text is the documentation of Python's own language, which every Python carries. Each prompt begins with a word of
its own, drawn anew for each run, so that no prefix cache holds its beginning, not even of an earlier run's.

A foreign server's tokenizer is not known here. How long a text of so many tokens is, is found by asking: the server
counts a few prompts, and a straight line through them says the rest.
"""

from __future__ import annotations

import functools
import importlib
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from workbench.serving.client import Wanted
from workbench.serving.faults import Fault

TRIES = 5
CLOSE = 0.02
"""A length this near to the one that was asked for is that."""


@functools.cache
def corpus() -> str:
    """The text that prompts are cut from."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return " ".join(" ".join(topics[name].split()) for name in sorted(topics))


@dataclass
class Prompts:
    """Where prompts come from; no two are alike."""

    seed: int
    run: str = ""
    """What tells this run's prompts from another's."""
    number: int = 0

    def __post_init__(self) -> None:
        self.run = self.run or secrets.token_hex(4)

    def text(self, characters: int) -> str:
        """A prompt of so many characters."""
        self.number += 1
        chance, whole = random.Random(self.seed * 1000003 + self.number), corpus()
        start = chance.randrange(len(whole))
        words = f"{self.number:x}{self.run} "
        while len(words) < characters:
            words += whole[start : start + characters - len(words)]
            start = 0
        return words[:characters]


async def characters_for(prompts: Prompts, tokens: int, count: Callable[[str], Awaitable[int]]) -> int:
    """How many characters a prompt of so many tokens has, by what the server counts of some. Raises `Fault` where it
    counts none, or its count does not follow the text."""
    tried: list[tuple[int, int]] = []
    # No tokenizer of this text has fewer characters a token: what is tried first fits if what is wanted does.
    characters = tokens
    for _ in range(TRIES):
        found = await count(prompts.text(characters))
        if found <= 0:
            raise Fault("it does not count a prompt's tokens (no usage), so no length can be given")
        tried.append((characters, found))
        if abs(found - tokens) <= CLOSE * tokens:
            break
        # A template's tokens are the same however long the text: only a difference says what a token's characters are.
        (before, fewer), (after, more) = tried[-2:] if len(tried) > 1 else ((0, 0), tried[-1])
        a_token = (after - before) / (more - fewer) if more != fewer else 1.0
        characters = max(1, characters + round((tokens - found) * max(0.1, a_token)))
    return min(tried, key=lambda each: abs(each[1] - tokens))[0]


def wanted_of(prompts: Prompts, characters: int, tokens: int, lengths: list[int]) -> list[Wanted]:
    """A request for each of these answers' lengths."""
    return [Wanted(prompts.text(characters), tokens, length) for length in lengths]
