"""Stored rows of older schemas, brought to the present one when they are read; what is on disk stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench.records import SCHEMA_VERSION

Migration = Callable[[Any], dict[str, object]]
"""From a stored row of one schema version to one of the next."""


def from_schema_1(old: Any) -> dict[str, object]:
    """A row of schema 1, which had the first evaluation set, its quality, the first prompt length and the first batch
    size in fields of their own beside the further ones, and called rounds turns."""
    row, load = {**old}, {**old["workload"]}
    load["prompt_tokens"] = [load.get("prompt_tokens", 512), *load.pop("more_prompt_tokens", [])]
    load["batches"] = [load.pop("batch", 1), *load.pop("more_batch", [])]
    first = row.pop("evaluation", None)
    name = first["name"] if first else ""
    row["evaluations"] = ({name: first} if first else {}) | row.get("evaluations", {})
    if row["measurement"]:
        found = row["measurement"] = {**row["measurement"]}
        quality = found.pop("quality", None)
        found["qualities"] = ({name: quality} if quality else {}) | found.get("qualities", {})
        for kind in ("speeds", "served"):
            found[kind] = [{**each, "rounds": each.get("turns", [])} for each in found.get(kind, [])]
    return {**row, "workload": load}


MIGRATIONS: dict[int, Migration] = {1: from_schema_1}
"""By the schema version that each starts from."""


def migrate(
    record: dict[str, object],
    version: int,
    target: int = SCHEMA_VERSION,
    migrations: Mapping[int, Migration] = MIGRATIONS,
) -> dict[str, object]:
    """A stored row brought from schema `version` to `target`, step by step.

    Raises `ValueError` if a step is missing.
    """
    for step in range(version, target):
        if step not in migrations:
            raise ValueError(f"no migration from schema version {step}")
        record = {**migrations[step](record), "schema_version": step + 1}
    return record
