"""A recipe's variants and backends, checked against the options of their own modules."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from workbench.disk import expanded
from workbench.errors import UserError, short, unknown
from workbench.recipe.messages import validate
from workbench.recipe.words import bad_name, twin
from workbench.records import CarriedVariant, Variant, to_json
from workbench.worker.backends import BACKENDS, Backend, backend_named
from workbench.worker.methods import BASE, METHODS, Making, Method, method_named

MOST_VARIANTS = 200


@dataclass(frozen=True)
class BackendChoice:
    """A backend, its options, and which variants it runs (shell patterns)."""

    name: str
    options: dict[str, object]
    patterns: tuple[str, ...] = ("*",)

    def takes(self, variant: str) -> bool:
        """Whether the recipe sends this variant to this backend."""
        return any(fnmatch.fnmatchcase(variant, pattern) for pattern in self.patterns)


def limits_of(variant: Variant) -> dict[str, str]:
    """Backend name -> why it cannot load what this variant's options make. What could be carried has no limits."""
    method, options = method_of(variant)
    return {} if isinstance(variant, CarriedVariant) else method.limits(options)


def method_of(variant: Variant) -> tuple[Method, Any]:
    """A variant's method, and its options as the method takes them."""
    method = method_named(variant.method)
    return method, method.Options(**variant.options)


def making_of(variant: Variant, cuda: bool = False) -> Making:
    """How a variant is made; `cuda`: on a machine with a GPU."""
    method, options = method_of(variant)
    making = method.making(options, cuda)
    return making.carried[variant.form] if isinstance(variant, CarriedVariant) else making


def forms_of(variant: Variant) -> tuple[str, ...]:
    """The formats that a variant is made in: first what its method makes, then what that is carried to."""
    return (variant.form,) if isinstance(variant, CarriedVariant) else method_named(variant.method).WRITES


def containers() -> set[str]:
    """The formats that variants of some method are carried to, the words of `{from: VARIANT}`."""
    return {form for word in METHODS for form in method_named(word).WRITES[1:]}


def placed(variant: Variant, folder: Path) -> Variant:
    """A variant whose method finds it somewhere, that place by its full path; `folder`: of the recipe."""
    path = variant.options.get("path")
    if not making_of(variant).headers or not path:
        return variant
    return replace(variant, options=variant.options | {"path": str(Path(folder, expanded(str(path))).absolute())})


def form_for(variant: Variant, backend: str) -> str:
    """The format that a backend gets of a variant: the first that it loads, or the first of all if it loads none."""
    return first_loaded(forms_of(variant), backend)


def first_loaded(forms: Sequence[str], backend: str) -> str:
    """The first of one format or more that a backend loads, or the first of all."""
    loaded = backend_named(backend).LOADS
    return next((form for form in forms if form in loaded), forms[0])


def wants_gguf_base(variants: Sequence[Variant], choices: Sequence[BackendChoice]) -> bool:
    """Whether the base is needed as a GGUF file: a variant is made from it, or an engine loads no other form of it."""
    return any(making_of(variant).stage == "gguf" for variant in variants) or any(
        form_for(Variant(BASE, BASE), choice.name) == "gguf" for choice in choices
    )


def parse_variants(raw: Any, where: str) -> tuple[Variant, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: variants: a list with at least one entry, such as `- gguf: Q4_K_M`")
    if len(raw) > MOST_VARIANTS:
        raise UserError(f"{where}: variants: {MOST_VARIANTS} at most, not {len(raw)}; make a second recipe")
    found = [Variant(BASE, BASE)]
    for i, entry in enumerate(raw):
        place = f"variants[{i}]"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {place}: write `- METHOD: {{options}}`, with METHOD one of {', '.join(METHODS)}")
        words, known = [key for key in entry if key != "name"], {**METHODS, **dict.fromkeys(containers())}
        for word in words:
            if word not in known:
                raise unknown("method", str(word), known, f"{where}: {place}")
        if len(words) != 1:
            raise UserError(f"{where}: {place}: one method an entry, found {short(', '.join(words) or 'none')}")
        word = words[0]
        value = {} if entry[word] is None else entry[word]
        if word not in METHODS or (word in containers() and isinstance(value, dict) and "from" in value):
            made: list[Variant] = [_carried(value, word, found, f"{where}: {place}.{word}")]
        else:
            made = _made(value, word, where, place)
        if len(made) > 1 and "name" in entry:
            raise UserError(
                f"{where}: {place}.name: a list makes several variants; leave the name out, or write each alone"
            )
        for variant in made:
            name = entry.get("name", variant.name)
            if reason := bad_name(name):
                raise UserError(f"{where}: {place}.name: {reason}")
            if other := twin(name, [variant.name for variant in found]):
                raise UserError(
                    f"{where}: {place}: a variant named '{short(other)}' is already there; give one a `name`"
                )
            found.append(replace(variant, name=name))
    return tuple(found)


def _made(value: Any, word: str, where: str, place: str) -> list[Variant]:
    """A variant by the options of its method, under the name that the method gives it; several where one is a list."""
    method = method_named(word)
    if method.SHORTHAND and not isinstance(value, dict):
        value = {method.SHORTHAND: value}
    made = []
    for point in _points(value, getattr(method, "AXES", ())):
        options = validate(TypeAdapter(method.Options), point, where, f"{place}.{word}")
        try:
            method.check(options)
        except UserError as error:
            raise UserError(f"{where}: {place}: {error}") from None
        made.append(Variant(method.default_name(options), word, _as_before(method, options)))
    return made


def _as_before(module: Method | Backend, options: Any) -> dict[str, object]:
    """Options as JSON, without those that came later and say nothing: keys are made of them, and stay."""
    later = [each for each in fields(options) if each.name in getattr(module, "LATER", ())]
    usual = {
        each.name: to_json(each.default_factory() if callable(each.default_factory) else each.default) for each in later
    }
    return {name: value for name, value in to_json(options).items() if name not in usual or value != usual[name]}


def _carried(value: Any, form: str, above: Sequence[Variant], where: str) -> CarriedVariant:
    """One of the variants `above` in another format: `{from: NAME}`."""
    if not isinstance(value, dict) or set(value) != {"from"}:
        more = ", ".join(sorted(str(key) for key in value if key != "from")) if isinstance(value, dict) else value
        raise UserError(f"{where}: write `{{from: VARIANT}}` and nothing else (found {short(more or 'nothing')})")
    name, place = value["from"], f"{where}.from"
    source = next((variant for variant in above if variant.name == name), None)
    if source is None:
        raise unknown("variant above it", name, [variant.name for variant in above[1:]], place)
    method, options = method_of(source)
    how = method.making(options, cuda=False).carried.get(form)
    if isinstance(source, CarriedVariant):
        reason = f"it is carried itself, name {source.source}"
    elif how is None:
        able = " or ".join(word for word in METHODS if form in method_named(word).WRITES[1:])
        reason = f"name a variant of {able}, not {'the base' if source.method == BASE else f'one of {source.method}'}"
    elif limit := method.limits(options).get(how.python):
        reason = limit
    else:
        return CarriedVariant(f"{form}-{source.name}", source.method, source.options, source.name, form)
    raise UserError(f"{place}: {name} cannot be carried to {form}: {reason}")


def parse_backends(raw: Any, where: str, variants: tuple[Variant, ...]) -> tuple[BackendChoice, ...]:
    if raw is None:
        raw = [name for name in BACKENDS if not getattr(backend_named(name), "BY_NAME", False)]
    if isinstance(raw, list) and all(isinstance(name, str) for name in raw):
        raw = dict.fromkeys(raw)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: backends: a list of names or a mapping from name to options")
    found = list[BackendChoice]()
    for name, options in raw.items():
        if name not in BACKENDS:
            raise unknown("backend", str(name), BACKENDS, f"{where}: backends")
        entries = options if isinstance(options, list) else [options]
        if not entries:
            raise UserError(f"{where}: backends.{name}: an empty list; name options, or write `{name}: {{}}`")
        for number, entry in enumerate(entries):
            place = f"backends.{name}" + (f"[{number}]" if isinstance(options, list) else "")
            found += _choices(name, entry, where, place, variants)
    for number, choice in enumerate(found):
        if any((choice.name, choice.options) == (other.name, other.options) for other in found[:number]):
            raise UserError(
                f"{where}: backends.{choice.name}: two entries have the same options; join their `variants`"
            )
    return tuple(found)


def _choices(name: str, options: Any, where: str, place: str, variants: tuple[Variant, ...]) -> Iterator[BackendChoice]:
    """What one entry of backend `name` means: a choice for each point of its axes."""
    if options is not None and not isinstance(options, dict):
        raise UserError(f"{where}: {place}: a mapping of options, a list of such, or nothing")
    options = dict(options or {})
    patterns = options.pop("variants", ["*"])
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise UserError(f"{where}: {place}.variants: a list of variant names or patterns")
    meant_by(patterns, variants, f"{where}: {place}.variants")
    backend = backend_named(name)
    for axis in backend.AXES:
        values = options.get(axis)
        if isinstance(values, list) and any(value in values[:i] for i, value in enumerate(values)):
            raise UserError(f"{where}: {place}.{axis}: names a value twice")
    for one in _points(options, backend.AXES):
        checked = validate(TypeAdapter(backend.Options), one, where, place, also={"variants"})
        yield BackendChoice(name, _as_before(backend, checked), tuple(patterns))


def _points(options: Any, axes: Sequence[str]) -> list[Any]:
    """The options for each value of those that may be lists."""
    if not isinstance(options, dict):
        return [options]
    several = {axis: options[axis] for axis in axes if isinstance(options.get(axis), list) and options[axis]}
    return [options | dict(zip(several, point, strict=True)) for point in itertools.product(*several.values())]


def meant_by(patterns: list[str], variants: tuple[Variant, ...], where: str) -> set[str]:
    """Names of the variants that any of the patterns means; a `UserError` at `where` for one that means none."""
    names, meant = [variant.name for variant in variants], set[str]()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise unknown("variant", pattern, names, where)
        meant.update(found)
    return meant
