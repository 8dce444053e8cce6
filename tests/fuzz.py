"""Spoiled JSON documents by a seed: what a reader of JSON meets when a file was edited, cut or written by another
program. How many a test tries: `WORKBENCH_MUTANTS`, for a long run by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OVERFLOW = "<a number beyond any float>"
"""Stands for `1e999` until the document is text."""
GONE = "<gone>"
"""`Mutant.new` of a key that was taken out."""

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "seven": 7,
    "zero": 0,
    "minus one": -1,
    "a fraction": 0.37,
    "minus a fraction": -0.37,
    "beyond 64 bits": 10**30,
    "beyond a float": 10**400,
    "1e300": 1e300,
    "overflow": OVERFLOW,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "a word": "word",
    "a number as text": "12",
    "nothing": "",
    "300 letters": "n" * 300,
    "a lone surrogate": "\ud800",
    "control characters": "a\x00\x1b[31m\nb",
    "a path out": "../../../tmp/x",
    "an empty list": [],
    "a list": [1, "two", None],
    "an empty object": {},
    "an object": {"a": {"b": [1]}},
    "a list in lists": [[[[[[[[]]]]]]]],
}
"""What a value is replaced by, by name."""


@dataclass(frozen=True)
class Mutant:
    """A document with one thing changed."""

    text: bytes
    """The document as UTF-8 JSON, or what is left of it."""
    what: str
    """A name of `VALUES`, or `gone`, `added`, `repeated`, `less`, `cut`, `a byte`, `deep`."""
    path: tuple[str | int, ...] = ()
    """Where; empty for what was done to the text or to the whole document."""
    old: Any = None
    """The value that was there; None for what was done to the text."""
    new: Any = None
    """The value that is there now; `GONE`; None for what was done to the text."""

    @property
    def of_text(self) -> bool:
        """Whether the text was changed, not a value: it may still be JSON, even the same."""
        return self.what in ("cut", "a byte", "deep")

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path)) or 'the whole'}: {self.what}"


def how_many(usual: int) -> int:
    """Mutants that a test tries: `WORKBENCH_MUTANTS`, or as many as fit among the fast tests."""
    return int(os.environ.get("WORKBENCH_MUTANTS") or usual)


def mutants(documents: list[Any], count: int, seed: int) -> Iterator[Mutant]:
    """`count` mutants of documents of plain JSON types, taken in turn; the same for the same seed.

    A place is found by descending at random, so that a field weighs as much as a table of a thousand names beside it.
    """
    chance = random.Random(seed)
    for number in range(count):
        yield mutant(documents[number % len(documents)], chance)


def mutant(document: Any, chance: random.Random) -> Mutant:
    """The document with one thing changed; the document itself stays as it is."""
    kind = chance.choices(("value", "gone", "added", "repeated", "less", "text"), (70, 10, 3, 6, 6, 5))[0]
    if kind == "text":
        return _of_text(json.dumps(document).encode(), chance)
    path = _place(document, chance)
    whole: dict[str | int, Any] = {"": copy.deepcopy(document)}
    holder: Any = whole
    for part in ("", *path)[:-1]:
        holder = holder[part]
    last = ("", *path)[-1]
    old = copy.deepcopy(holder[last])
    if kind == "added" and isinstance(old, dict):
        holder[last]["added by nobody"] = {"x": [1]}
    elif kind == "repeated" and isinstance(old, list) and old:
        holder[last].insert(chance.randrange(len(old) + 1), copy.deepcopy(chance.choice(old)))
    elif kind == "less" and isinstance(old, list) and old:
        del holder[last][chance.randrange(len(old))]
    elif kind == "gone" and path and isinstance(holder, dict):
        del holder[last]
        return Mutant(_text(whole[""]), kind, path, old, GONE)
    else:
        kind = chance.choice(list(VALUES))
        holder[last] = copy.deepcopy(VALUES[kind])
    return Mutant(_text(whole[""]), kind, path, old, holder[last])


def _place(document: Any, chance: random.Random) -> tuple[str | int, ...]:
    path: list[str | int] = []
    here = document
    while isinstance(here, dict | list) and here and chance.random() < 0.9:
        path.append(chance.choice(list(here)) if isinstance(here, dict) else chance.randrange(len(here)))
        here = here[path[-1]]
    return tuple(path)


def _text(document: Any) -> bytes:
    return json.dumps(document).replace(json.dumps(OVERFLOW), "1e999").encode()


def _of_text(text: bytes, chance: random.Random) -> Mutant:
    place = chance.randrange(len(text))
    kind = chance.choice(("cut", "a byte", "deep"))
    if kind == "cut":
        return Mutant(text[:place], kind)
    if kind == "a byte":
        return Mutant(text[:place] + bytes([chance.randrange(256)]) + text[place + 1 :], kind)
    return Mutant(text[:-1] + b', "deep": ' + b"[" * 50_000 + b"]" * 50_000 + text[-1:], kind)
