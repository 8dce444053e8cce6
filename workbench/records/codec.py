"""Records as plain JSON and back, and the digest of either."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable
from typing import Any

try:
    import msgspec
except ImportError:  # an engine's own interpreter, which is given only what the parent has checked
    msgspec = None  # type: ignore[assignment]


def digest(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(value: Any) -> Any:
    """A record (or a container of them) as plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json` for a type built of the records here.

    Unknown keys are dropped, so that a row with fields added later can still be read. Raises `ValueError` with the
    place for a missing field without a default, a wrong type, and what is not within its limits (`limits.py`).
    """
    if msgspec is not None:
        return msgspec.convert(value, kind)
    try:
        reader = _reader(kind)
        return value if reader is None else reader(value)
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """How a type is read without a check; None where its JSON is it already."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        fields = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(kind)}

        def record(value: Any) -> Any:
            known = {name: item for name, item in value.items() if name in fields}
            for name, item in known.items():
                reader = fields[name]
                if reader is not None:
                    known[name] = reader(item)
            return kind(**known)

        return record
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = _reader(next(a for a in arguments if a is not type(None)))
        return None if inner is None else lambda value: None if value is None else inner(value)
    if origin not in (list, dict):
        return None
    item_of = _reader(arguments[-1])
    if origin is list:
        return list if item_of is None else lambda value: [item_of(item) for item in value]
    return dict if item_of is None else lambda value: {key: item_of(item) for key, item in value.items()}
