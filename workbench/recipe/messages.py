"""A validation error in a person's words: the place, what is wrong, what was perhaps meant."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workbench.errors import UserError, did_you_mean, short

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic's names for it, in models and in dataclasses."""


def validate(adapter: TypeAdapter[Any], value: Any, where: str, place: str, also: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    try:
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        # A mistyped key is also a missing one; what was mistyped is what the person can see.
        first = min(error.errors(), key=lambda one: one["type"] not in UNKNOWN_KEY)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {place or 'recipe'}: {error}") from None
    kind, context, location = first["type"], first.get("ctx", {}), first["loc"]
    if kind in UNKNOWN_KEY:
        known, key, location = _keys(adapter, location) | also, location[-1], location[:-1]
        message = f"unknown key '{short(key)}'. {did_you_mean(str(key), known)}"
    elif kind == "literal_error":
        values = re.findall(r"[^\s',]+(?=[',]|$| or )", context["expected"])
        message = f"unknown value '{short(first['input'])}'. {did_you_mean(str(first['input']), values)}"
    elif kind in ("missing", "missing_argument"):
        message = "missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], dict | list):
            message += f" (found {short(repr(first['input']))})"
    place = _place(place, location)
    raise UserError(f"{where}: {place + ': ' if place else ''}{message}")


def _place(prefix: str, location: tuple[int | str, ...]) -> str:
    place = prefix
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in ("str", "dict[str,any]", "one", "several", "word", "number"):
            place += f".{short(part)}" if place else short(part)
    return place


def _keys(adapter: TypeAdapter[Any], location: tuple[int | str, ...]) -> set[str]:
    """The keys known where an unknown one was found, from the schema that editors use."""
    whole = adapter.json_schema()
    node = whole
    for part in location[:-1]:
        held = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
        any_name = next((kind for kind in held if isinstance(kind, dict)), {})
        node = node.get("properties", {}).get(part, any_name)
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = whole["$defs"][option["$ref"].rsplit("/", 1)[1]]
    return set(node.get("properties", {}))
