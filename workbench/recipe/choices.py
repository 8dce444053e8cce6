"""A recipe's variants and backends, checked against the options of their own modules."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from workbench.errors import UserError, unknown
from workbench.recipe.messages import validate
from workbench.records import Variant, to_json
from workbench.worker.backends import BACKENDS
from workbench.worker.methods import METHODS


@dataclass(frozen=True)
class BackendChoice:
    """A backend, its options, and which variants it runs (shell patterns)."""

    name: str
    options: dict[str, Any]
    patterns: tuple[str, ...] = ("*",)

    def takes(self, variant: str) -> bool:
        """Whether the recipe sends this variant to this backend."""
        return any(fnmatch.fnmatchcase(variant, pattern) for pattern in self.patterns)


def limits_of(variant: Variant) -> dict[str, str]:
    """Backend name -> why it cannot load what this variant's options make."""
    if variant.method == "base":
        return {}
    module, options = method_of(variant)
    return dict(module.limits(options))


def format_of(variant: Variant) -> str:
    """The artifact format a variant will have."""
    return "safetensors" if variant.method == "base" else str(import_named(METHODS[variant.method]).FORMAT)


def import_named(name: str) -> Any:
    return importlib.import_module(name)


def method_of(variant: Variant) -> tuple[Any, Any]:
    if variant.method == "base":
        return _BaseMethod, None
    module = import_named(METHODS[variant.method])
    return module, module.Options(**variant.options)


class _BaseMethod:
    """The base needs nothing and every engine loads it."""

    @staticmethod
    def needs_calibration(options: Any) -> bool:
        return False


def parse_variants(raw: Any, where: str) -> tuple[Variant, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: variants: a list with at least one entry, such as `- gguf: Q4_K_M`")
    found = [Variant("base", "base")]
    for i, entry in enumerate(raw):
        place = f"variants[{i}]"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {place}: write `- METHOD: {{options}}`, with METHOD one of {', '.join(METHODS)}")
        words = [key for key in entry if key != "name"]
        for word in words:
            if word not in METHODS:
                raise unknown("method", str(word), METHODS, f"{where}: {place}")
        if len(words) != 1:
            raise UserError(f"{where}: {place}: one method an entry, found {', '.join(words) or 'none'}")
        word = words[0]
        module = import_named(METHODS[word])
        value = entry[word]
        if value is None:
            value = {}
        if word == "gguf" and not isinstance(value, dict):
            value = {"type": value}
        options = validate(TypeAdapter(module.Options), value, where, f"{place}.{word}")
        if hasattr(module, "check"):
            try:
                module.check(options)
            except UserError as error:
                raise UserError(f"{where}: {place}: {error}") from None
        name = entry.get("name") or module.default_name(options)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"{where}: {place}.name: letters, digits, '.', '_' and '-' only, not {name!r}")
        if name in {variant.name for variant in found}:
            raise UserError(f"{where}: {place}: a variant named '{name}' is already there; give one a `name`")
        found.append(Variant(name, word, to_json(options)))
    return tuple(found)


def parse_backends(raw: Any, where: str, variants: tuple[Variant, ...]) -> tuple[BackendChoice, ...]:
    if raw is None:
        raw = list(BACKENDS)
    if isinstance(raw, list) and all(isinstance(name, str) for name in raw):
        raw = dict.fromkeys(raw)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: backends: a list of names or a mapping from name to options")
    found = []
    for name, options in raw.items():
        if name not in BACKENDS:
            raise unknown("backend", str(name), BACKENDS, f"{where}: backends")
        place = f"backends.{name}"
        if options is not None and not isinstance(options, dict):
            raise UserError(f"{where}: {place}: a mapping of options, or nothing")
        options = dict(options or {})
        patterns = options.pop("variants", ["*"])
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise UserError(f"{where}: {place}.variants: a list of variant names or patterns")
        meant_by(patterns, variants, f"{where}: {place}.variants")
        kind = import_named(BACKENDS[name]).Options
        axis = options.get("kv_cache")
        values = axis if isinstance(axis, list) and axis else [axis]
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{where}: {place}.kv_cache: names a value twice")
        for value in values:
            one = options if value is None else {**options, "kv_cache": value}
            checked = validate(TypeAdapter(kind), one, where, place, also={"variants"})
            found.append(BackendChoice(name, to_json(checked), tuple(patterns)))
    return tuple(found)


def meant_by(patterns: list[str], variants: tuple[Variant, ...], where: str) -> set[str]:
    """Names of the variants that any of the patterns means; a `UserError` at `where` for one that means none."""
    names, meant = [variant.name for variant in variants], set[str]()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise unknown("variant", pattern, names, where)
        meant.update(found)
    return meant
