"""Stored rows of older schemas, brought to the present one when they are read; what is on disk stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from workbench.records import SCHEMA_VERSION

Parts = Mapping[str, Any]
"""A stored row as the JSON text of each of its fields."""
Migration = Callable[[Parts], dict[str, Any]]
"""From a stored row of one schema version to one of the next."""
Texts = dict[str, msgspec.Raw]


def from_schema_1(old: Parts) -> dict[str, Any]:
    """A row of schema 1, which had the first evaluation set, its quality, the first prompt length and the first batch
    size in fields of their own beside the further ones, and called rounds turns."""
    load, tests = _read(old, "workload", dict[str, Any]), _read(old, "evaluations", Texts, b"{}")
    first, measured = _read(old, "evaluation", Texts | None), _read(old, "measurement", Texts | None)
    name = "" if first is None else _read(first, "name", str)
    for several, one, many, usual in (
        ("prompt_tokens", "prompt_tokens", "more_prompt_tokens", 512),
        ("batches", "batch", "more_batch", 1),
    ):
        load[several] = [load.pop(one, usual), *msgspec.convert(load.pop(many, []), list)]
    row = {**old, "workload": _text(load), "evaluations": _text(({} if first is None else {name: first}) | tests)}
    if measured is not None:
        quality, qualities = measured.pop("quality", None), _read(measured, "qualities", Texts, b"{}")
        own = {} if quality is None or bytes(quality) == b"null" else {name: quality}
        more = {
            kind: [{**each, "rounds": each.get("turns", [])} for each in _read(measured, kind, list[Texts], b"[]")]
            for kind in ("speeds", "served")
        }
        row["measurement"] = _text(measured | {"qualities": own | qualities} | more)
    return row


_text = msgspec.json.encode


def _read(parts: Parts, name: str, kind: Any, usual: bytes = b"null") -> Any:
    try:
        return msgspec.json.decode(parts.get(name, usual), type=kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from None


MIGRATIONS: dict[int, Migration] = {1: from_schema_1}
"""By the schema version that each starts from."""


def migrate(
    parts: Parts, version: int, target: int = SCHEMA_VERSION, migrations: Mapping[int, Migration] = MIGRATIONS
) -> dict[str, Any]:
    """A stored row brought from schema `version` to `target`, step by step.

    Raises `ValueError` if a step is missing, or for what is no row of its schema.
    """
    for step in range(version, target):
        if step not in migrations:
            raise ValueError(f"no migration from schema version {step}")
        parts = {**migrations[step](parts), "schema_version": b"%d" % (step + 1)}
    return {**parts}
