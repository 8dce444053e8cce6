"""A recipe's endpoints: servers that somebody else started, each a row beside those of the recipe's engines."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from workbench.errors import UserError, short, unknown
from workbench.recipe.messages import validate
from workbench.recipe.sources import Strict
from workbench.recipe.words import Name, Word
from workbench.records import Variant
from workbench.serving.address import address_of

Price = Annotated[float, Field(ge=0, le=1e9)]


class TokenPrice(Strict):
    """What an API takes for a million tokens."""

    input: Price
    """Of prompts."""
    output: Price
    """Of answers."""


class Endpoint(Strict):
    """A server that speaks the OpenAI API."""

    url: Word
    """Its address, as `http://127.0.0.1:8000/v1`."""
    model: Word | None = None
    """Which of its models (default: the only one)."""
    variant: Name | None = None
    """Which of the recipe's variants it serves, whose size its row then has (default: none, the row has the endpoint's
    name)."""
    api_key_env: Annotated[Word, Field(pattern=r"^[A-Za-z_]\w*$", max_length=100)] | None = None
    """The variable that holds its key, which is never stored."""
    price: TokenPrice | None = None
    """What it takes for a million tokens, for `workbench cost`."""


Endpoints = Annotated[dict[Name, Endpoint], Field(max_length=100)]


def parse_endpoints(raw: Any, where: str, variants: tuple[Variant, ...]) -> dict[str, Endpoint]:
    """Endpoints by name. Raises `UserError` with place and remedy."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: endpoints: a mapping from a name to `url`, and perhaps `model` and `variant`")
    found: dict[str, Endpoint] = validate(TypeAdapter(Endpoints), raw, where, "endpoints")
    names = [variant.name for variant in variants]
    for name, each in found.items():
        place = f"{where}: endpoints.{short(name)}"
        try:
            address_of(each.url)
        except UserError as problem:
            raise UserError(f"{place}.url: {str(problem).removeprefix('--endpoint').lstrip(': ')}") from None
        if each.variant and each.variant not in names:
            raise unknown("variant", each.variant, names, f"{place}.variant")
        if not each.variant and name in names:
            raise UserError(f"{place}: '{name}' is a variant's name: say `variant: {name}` if it serves that")
    return found
