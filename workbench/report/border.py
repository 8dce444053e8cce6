"""A stored line becomes a row here, or is refused in words: whoever has a row relies on what `records/` says of it.

A line is cut into its fields, and each is read by the type that the record gives it. What nights have in common, the
artifact before all, is the same text each time and is read once: rows share it. What no command asks of a stored row is
checked and not kept: of the tensors, which are half of a line, one of each type is, without how well it was made.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from workbench.errors import UserError
from workbench.records import SCHEMA_VERSION, Artifact, Row
from workbench.report.migrate import migrate

SHARED = 1024
"""Texts of one field that are remembered."""
FIELDS = dataclasses.fields(Row)
NEEDED = {f.name for f in FIELDS if f.default is f.default_factory is dataclasses.MISSING}
cut = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def row_of(line: bytes) -> Row:
    """The row of a stored line of any schema up to this one's.

    Raises `UserError` for a newer schema and `ValueError` with the reason for what is no whole row.
    """
    parts: Mapping[str, Any] = cut(line)
    version: int = READERS["schema_version"](bytes(parts.get("schema_version", b"null")))
    if version > SCHEMA_VERSION:
        raise UserError(
            f"written by a newer workbench (row schema {version}; this one reads up to {SCHEMA_VERSION}). "
            "Upgrade the workbench, or name results without this file"
        )
    if version < SCHEMA_VERSION:
        parts = migrate(parts, version)
    if missing := NEEDED - parts.keys():
        raise ValueError(f"no {', '.join(sorted(missing))}")
    row = Row(**{name: read(bytes(parts[name])) for name, read in READERS.items() if name in parts})
    _check(row)
    return row


def _reader(name: str, kind: Any) -> Callable[[bytes], Any]:
    """How the text of a field is read."""
    decode = msgspec.json.Decoder(kind).decode

    def read(text: bytes) -> Any:
        try:
            value = decode(text)
        except (ValueError, RecursionError) as error:
            told = str(error)
            raise ValueError(told.replace("$", name, 1) if "$" in told else f"{name}: {told}") from None
        return _lean(value) if isinstance(value, Artifact) else value

    return read if name == "measurement" else functools.lru_cache(SHARED)(read)


READERS = {name: _reader(name, kind) for name, kind in typing.get_type_hints(Row, include_extras=True).items()}


OF_TENSORS = ("tensor_errors", "tensor_prices", "layers", "experts")
"""What an artifact's record says of each tensor or layer and no report needs."""


def _lean(artifact: Artifact) -> Artifact:
    kept = {name: value for name, value in artifact.provenance.items() if name not in OF_TENSORS}
    types = {kind: name for name, kind in artifact.tensor_types.items()}
    return dataclasses.replace(artifact, tensor_types={name: kind for kind, name in types.items()}, provenance=kept)


def _check(row: Row) -> None:
    """Raises `ValueError` where the parts of a row contradict each other."""
    datetime.fromisoformat(row.started_at)
    measured = row.measurement
    for name, free in (("options", row.options), ("measurement.settings", measured.settings if measured else {})):
        if _leaves_64_bits(free):
            raise ValueError(f"{name}: a whole number of more than 64 bits")
    if measured is None:
        if not row.error and not row.unsupported:
            raise ValueError("neither measured nor a reason why not")
        return
    for name, quality in measured.qualities.items():
        test, windows = row.evaluations.get(name), quality["windows"]
        scored = sum(window["count"] + window["nonfinite"] for window in windows)
        if test is None or (len(windows), scored) != (test.windows, test.scored_tokens):
            raise ValueError(f"measurement.qualities.{name}: not of the tokens of evaluations.{name}")
    for name, answers in measured.tasks.items():
        task = row.tasks.get(name)
        if task is None or task.items not in (None, len(answers["correct"])):
            raise ValueError(f"measurement.tasks.{name}: not of the items of tasks.{name}")


def _leaves_64_bits(value: object) -> bool:
    """Whether a whole number in it, at any depth, is one that other programs' columns cannot hold."""
    if isinstance(value, dict | list):
        return any(map(_leaves_64_bits, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63
