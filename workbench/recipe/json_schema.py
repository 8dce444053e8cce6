"""The JSON Schema of a recipe, for editors, with what each key means: the docstrings of its fields in `model.py` and in
the options of methods and engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from workbench.recipe.choices import containers
from workbench.recipe.endpoints import Endpoint
from workbench.recipe.model import Document, EvaluationModel
from workbench.recipe.words import NAME
from workbench.worker.backends import BACKENDS, backend_named
from workbench.worker.methods import METHODS, method_named

VARIANTS = "What is made of the base, in order: a method each, with its options. The base itself is always measured."
VARIANT_NAME = "What the variant is called in tables and on the command line (default: made of its options)."
BACKENDS_KEY = "The engines that run the variants, each with its options, or a list of their names (default: all)."
ENDPOINTS = "Servers that somebody else started, by name: measured over HTTP after the engines, a row each."
PATTERNS = "Which variants this engine runs, by names or patterns such as `gguf-*` (default: all)."
ENTRIES = "Several sets of options, each with its `variants`."
LISTED = " A list makes a variant of each."
SEVERAL = " A list of values measures every variant with each."
CARRIED_FROM = "A variant above it, AWQ or GPTQ, whose weights are written in this format as they are."
CARRIED = {
    "type": "object",
    "properties": {"from": {"type": "string", "pattern": NAME, "description": CARRIED_FROM}},
    "required": ["from"],
    "additionalProperties": False,
    "title": "another variant's weights",
}


def schema() -> dict[str, object]:
    """The JSON Schema of a recipe, for editors; generated from the same types that validate."""
    top = TypeAdapter(Document).json_schema(ref_template="#/$defs/{model}")
    definitions = top.setdefault("$defs", {})

    def options_of(kind: type, name: str) -> dict[str, Any]:
        own = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own["title"] = name
        return own

    forms: list[object] = [_entry(word, [CARRIED], CARRIED_FROM) for word in sorted(containers())]
    for word, method in {word: method_named(word) for word in METHODS}.items():
        options = options_of(method.Options, f"{word} options")
        _several(options, getattr(method, "AXES", ()), LISTED)
        forms_of_value: list[object] = [options]
        if method.SHORTHAND:
            forms_of_value.append(options["properties"][method.SHORTHAND])
        if not options.get("required") and "oneOf" not in options:
            forms_of_value.append({"type": "null"})
            forms.append({"const": word})
        forms.append(_entry(word, forms_of_value, options["description"]))
    backends = {}
    for word, backend in {word: backend_named(word) for word in BACKENDS}.items():
        options = options_of(backend.Options, f"{word} options")
        listed = {"type": "array", "items": {"type": "string"}, "description": PATTERNS}
        options["properties"]["variants"] = listed
        _several(options, backend.AXES, SEVERAL)
        top["$defs"][word] = options
        entry = {"$ref": f"#/$defs/{word}"}
        entries = {"type": "array", "items": entry, "minItems": 1, "description": ENTRIES}
        backends[word] = {"anyOf": [entry, entries, {"type": "null"}], "description": options["description"]}
    one_set = {"$ref": "#/$defs/EvaluationModel"}
    several = {"type": "object", "additionalProperties": one_set, "minProperties": 1}
    several |= {"propertyNames": {"pattern": NAME, "not": {"enum": list(EvaluationModel.model_fields)}}}
    top["properties"]["evaluation"] |= {"anyOf": [one_set, several, {"type": "null"}]}
    variants = {"type": "array", "items": {"anyOf": forms}, "minItems": 1, "description": VARIANTS}
    top["properties"]["variants"] = variants
    top["properties"]["backends"] = {
        "description": BACKENDS_KEY,
        "anyOf": [
            {"type": "object", "properties": backends, "additionalProperties": False},
            {"type": "array", "items": {"enum": list(BACKENDS)}, "minItems": 1},
            {"type": "null"},
        ],
    }
    endpoint = options_of(Endpoint, "endpoint options")
    top["properties"]["endpoints"] = {
        "description": ENDPOINTS,
        "anyOf": [
            {"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": endpoint},
            {"type": "null"},
        ],
    }
    top["required"] = ["base", "variants"]
    top["title"] = "Workbench recipe"
    _unwrap(top)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top}


def _several(options: dict[str, Any], axes: Sequence[str], said: str) -> None:
    """Let options be lists, which is said at the end of their descriptions."""
    for axis in axes:
        single = options["properties"][axis]
        several = {"type": "array", "items": single, "minItems": 1, "uniqueItems": True}
        description = single.pop("description") + said
        options["properties"][axis] = {"anyOf": [single, several], "description": description}


def _unwrap(part: object) -> None:
    """Make each description one line: an editor would break it where the source's lines end."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _unwrap(value)
    if isinstance(part, dict) and isinstance(part.get("description"), str):
        part["description"] = " ".join(part["description"].split())


def _entry(word: str, values: list[object], description: str) -> dict[str, object]:
    """A variant with one of these values."""
    properties = {
        word: {"anyOf": values, "description": description},
        "name": {"type": "string", "pattern": NAME, "description": VARIANT_NAME},
    }
    return {"type": "object", "properties": properties, "required": [word], "additionalProperties": False}
