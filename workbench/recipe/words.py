"""What words and numbers may stand in a recipe: each number has an end, each name is a file's on every system."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from workbench.disk import expanded
from workbench.errors import UserError, short

LONGEST_NAME = 100
"""Bytes; a file's name is made of two and an ending, and may have 255."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.(json)?", re.IGNORECASE)
"""Names that Windows keeps for devices, an end that it drops, and the end of the program's own records."""
NAME = r"^[A-Za-z0-9][\w.-]*$"
"""Of a recipe, a model, a variant, an evaluation set or a task, as editors check it; `bad_name` says the rest."""
HUB = r"^\w[\w.-]*(/\w[\w.-]*)?$"
PACKAGE = r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
"""A distribution's name, as PEP 508 has it."""
MODULE = r"^[^\W\d]\w*(\.[^\W\d]\w*)*$"
"""A module's full name."""
MOST_TOKENS = 2**20
"""Of one sequence."""
MOST_CUT = 2**26
"""Tokens of all windows of a text: a streamed dataset would be read for days."""


def bad_name(value: object) -> str:
    """What a name must be instead; empty for a good one."""
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        return f"letters, digits, '.', '_' and '-' only, not {short(repr(value))}"
    if len(value.encode()) > LONGEST_NAME:
        return f"{LONGEST_NAME} letters at most, not '{short(value)}'"
    return f"what can name any file anywhere, not '{short(value)}'" if RESERVED.fullmatch(value) else ""


def plain_name(text: str) -> str:
    """A name made of any text: `path: ..` or a model type with a slash must not lead anywhere else."""
    name = re.sub(r"[^\w.-]+", "-", text).lstrip(".-")
    return name.encode()[:LONGEST_NAME].decode(errors="ignore") or "model"


def twin(name: str, names: Iterable[str]) -> str | None:
    """Which of the names is that one for file systems to which A and a are the same."""
    return next((other for other in names if other.casefold() == name.casefold()), None)


def known_home(path: str) -> str:
    """The path as it is. Raises `ValueError` where its `~name` is nobody's."""
    try:
        expanded(path)
    except UserError as error:
        raise ValueError(str(error)) from None
    return path


def of_64_bits(value: object) -> bool:
    """Whether all numbers in a value of JSON's types are."""
    if isinstance(value, dict | list):
        return all(map(of_64_bits, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or -(2**63) < value < 2**63


def _named(value: str) -> str:
    if reason := bad_name(value):
        raise ValueError(reason)
    return value


Name = Annotated[str, Field(pattern=NAME), AfterValidator(_named)]
Text = Annotated[str, Field(min_length=1)]
Word = Annotated[str, Field(min_length=1, max_length=1000)]
File = Annotated[Word, AfterValidator(known_home)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Window = Annotated[int, Field(ge=8, le=MOST_TOKENS)]
Windows = Annotated[int, Field(ge=1, le=100_000)]
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]
