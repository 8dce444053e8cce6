"""The JSON Schema of a recipe, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from workbench.recipe.model import Document, EvaluationModel
from workbench.recipe.words import NAME
from workbench.worker.backends import BACKENDS, backend_named
from workbench.worker.methods import METHODS, method_named


def schema() -> dict[str, object]:
    """The JSON Schema of a recipe, for editors; generated from the same types that validate."""
    top = TypeAdapter(Document).json_schema(ref_template="#/$defs/{model}")
    definitions = top.setdefault("$defs", {})

    def options_of(kind: type, name: str) -> dict[str, Any]:
        own = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own["title"] = name
        return own

    forms: list[object] = []
    for word, method in {word: method_named(word) for word in METHODS}.items():
        options = options_of(method.Options, f"{word} options")
        forms_of_value: list[object] = [options]
        if method.SHORTHAND:
            forms_of_value.append(options["properties"][method.SHORTHAND])
        if not options.get("required"):
            forms_of_value.append({"type": "null"})
            forms.append({"const": word})
        forms.append(
            {
                "type": "object",
                "properties": {word: {"anyOf": forms_of_value}, "name": {"type": "string", "pattern": NAME}},
                "required": [word],
                "additionalProperties": False,
            }
        )
    backends = {}
    for word, backend in {word: backend_named(word) for word in BACKENDS}.items():
        options = options_of(backend.Options, f"{word} options")
        options["properties"]["variants"] = {"type": "array", "items": {"type": "string"}}
        for axis in backend.AXES:
            single = options["properties"][axis]
            several = {"type": "array", "items": single, "minItems": 1, "uniqueItems": True}
            options["properties"][axis] = {"anyOf": [single, several]}
        backends[word] = {"anyOf": [options, {"type": "null"}]}
    one_set = {"$ref": "#/$defs/EvaluationModel"}
    several = {"type": "object", "additionalProperties": one_set, "minProperties": 1}
    several |= {"propertyNames": {"pattern": NAME, "not": {"enum": list(EvaluationModel.model_fields)}}}
    top["properties"]["evaluation"] = {"anyOf": [one_set, several, {"type": "null"}], "default": None}
    top["properties"]["variants"] = {"type": "array", "items": {"anyOf": forms}, "minItems": 1}
    top["properties"]["backends"] = {
        "anyOf": [
            {"type": "object", "properties": backends, "additionalProperties": False},
            {"type": "array", "items": {"enum": list(BACKENDS)}, "minItems": 1},
            {"type": "null"},
        ]
    }
    top["required"] = ["base", "variants"]
    top["title"] = "Workbench recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top}
