"""What machines and tokens cost, from a person's own file: no price is built in.

currency: EUR
traffic: {requests_a_day: 20000, peak: 3}
machines: {my-gpu-server: 1.20}                    # an hour, by the machine's name in the rows
apis: {some-model: {input: 0.15, output: 0.60}}    # a million tokens
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from workbench.disk import expanded
from workbench.errors import LONGEST_PATH, UserError, short
from workbench.recipe.endpoints import Price, TokenPrice
from workbench.recipe.messages import validate
from workbench.recipe.sources import Strict
from workbench.recipe.words import Word
from workbench.recipe.yaml_text import MAX_BYTES, parse_yaml


class Traffic(Strict):
    """How much is asked for."""

    requests_a_day: Annotated[float, Field(gt=0, le=1e12)]
    """Requests a day, on average."""
    peak: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """How many times the average the busiest hour has: machines are counted for that."""
    prompt_tokens: Annotated[float, Field(gt=0, le=1e7)] | None = None
    """Of a request (default: as measured)."""
    new_tokens: Annotated[float, Field(gt=0, le=1e7)] | None = None
    """Of an answer (default: as measured)."""


class Prices(Strict):
    """A file of prices."""

    traffic: Traffic
    currency: Annotated[Word, Field(max_length=20)] = ""
    """As it is printed; nothing is converted."""
    machines: Annotated[dict[Word, Price], Field(max_length=1000)] = {}
    """What an hour costs, by the machine's name in the rows."""
    apis: Annotated[dict[Word, TokenPrice], Field(max_length=100)] = {}
    """What is charged elsewhere, by any name."""


def load_prices(path: str | Path) -> Prices:
    """A file of prices, checked. Raises `UserError` with file, place and remedy."""
    said = short(path, LONGEST_PATH)
    try:
        with open(expanded(path), "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8"
        raise UserError(
            f"{said}: cannot be read ({reason}). Name a YAML file of prices, as docs/serving.md has one"
        ) from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{said}: too large for a file of prices (at most {MAX_BYTES} bytes)")
    given = parse_yaml(text, said)
    if not isinstance(given, dict):
        raise UserError(f"{said}: prices are a mapping with `traffic`, `machines` and `apis`")
    found: Prices = validate(TypeAdapter(Prices), given, said, "")
    if not found.machines and not found.apis:
        raise UserError(f"{said}: no prices: give `machines` (an hour), `apis` (a million tokens), or both")
    return found


def with_endpoints(prices: Prices, asked: Mapping[str, Mapping[str, object]]) -> Prices:
    """The prices, and those that rows of endpoints have among their options, by the row's name. A price that is none
    is left out: anybody may have written a row."""
    found = dict[str, TokenPrice]()
    for name, options in asked.items():
        with contextlib.suppress(ValidationError):
            found[name] = TokenPrice.model_validate(options.get("price"))
    return prices.model_copy(update={"apis": found | prices.apis})
