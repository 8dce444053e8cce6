"""Stored rows of older schemas, brought to the present one when they are read; what is on disk stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from workbench.records import SCHEMA_VERSION

Parts = Mapping[str, Any]
"""A stored row as the JSON text of each of its fields."""
Object = dict[str, Any]
Migration = Callable[[Parts], dict[str, Any]]
"""From a stored row of one schema version to one of the next."""


def from_schema_1(old: Parts) -> dict[str, Any]:
    """A row of schema 1, which had the first evaluation set, its quality, the first prompt length and the first batch
    size in fields of their own beside the further ones, and called rounds turns."""
    row = {**old}
    load, tests = _read(old, "workload", Object), _read(old, "evaluations", Object, b"{}")
    first, measured = _read(old, "evaluation", Object | None), _read(old, "measurement", Object | None)
    name = str(first.get("name")) if first is not None else ""
    for several, one, many, usual in (
        ("prompt_tokens", "prompt_tokens", "more_prompt_tokens", 512),
        ("batches", "batch", "more_batch", 1),
    ):
        load[several] = [load.pop(one, usual), *msgspec.convert(load.pop(many, []), list)]
    row["evaluations"] = msgspec.json.encode(({} if first is None else {name: first}) | tests)
    row["workload"] = msgspec.json.encode(load)
    if measured is not None:
        quality, qualities = measured.pop("quality", None), measured.get("qualities", {})
        measured["qualities"] = ({} if quality is None else {name: quality}) | msgspec.convert(qualities, dict)
        for kind in ("speeds", "served"):
            samples = msgspec.convert(measured.get(kind, []), list[dict[str, Any]])
            measured[kind] = [{**each, "rounds": each.get("turns", [])} for each in samples]
        row["measurement"] = msgspec.json.encode(measured)
    return row


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
