"""Rows on disk: one JSON object a line in `<results>/<machine>/rows.jsonl`, only ever appended to.

A line is written by one `write` on a descriptor opened with O_APPEND, under an exclusive lock, and synced
before `append` returns: two writers cannot interleave, and a row that was reported as stored survives a
power cut. A process killed in the middle leaves at most one half line; the next `append` starts a new
line after it, and `read` skips it with a warning. Nothing is rewritten, so history stays whole and a
results folder merges in git like text. Rejected: SQLite (no diff, no merge, one writer on a network
file system), one file a row (thousands of files a year), rewrite-and-rename (loses a concurrent writer's
row).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.records import SCHEMA_VERSION, Row, digest, from_json, to_json

FILE_NAME = "rows.jsonl"

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From a stored row of the schema version that is the key to one of the next version."""


def machine_of(row: Row) -> str:
    """The machine's name; where a row carries none, a digest of all it says of the machine."""
    name = row.machine.get("name")
    return name if isinstance(name, str) and name else digest(row.machine)


def append(results: Path, machine: str, row: Row) -> None:
    """Store one row durably under `results/machine`, creating the file if need be.

    Numbers that are not finite become null, because JSON has no NaN and every reader must get through.
    Raises `UserError` if the file cannot be written; it then is as it was before.
    """
    if not machine or machine in (".", "..") or any(mark in machine for mark in "/\\\0\n"):
        raise UserError(f"machine name {machine!r} cannot name a folder: use letters, digits, '-', '_' and '.'")
    line = json.dumps(_finite(to_json(row)), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    path = results / machine / FILE_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(file, line) < len(line):
                os.ftruncate(file, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file)
        finally:
            os.close(file)
        if size == 0:
            _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot store a row ({reason}). Free space, check permissions or name another --results"
        ) from error


def read(*paths: Path) -> tuple[list[Row], list[str]]:
    """All rows of the given files and folders, and a warning for each line that had to be skipped.

    A folder stands for its `rows.jsonl` and for those one level below; one that does not exist holds no
    rows. Of rows with the same machine and key the last one read wins and keeps the first one's place.
    Raises `UserError` for a named file that is missing or unreadable, and for rows of a newer schema.
    """
    rows: dict[tuple[str, str], Row] = {}
    warnings: list[str] = []
    for path in paths:
        for file in _files(path):
            for number, line in enumerate(_content(file).split(b"\n"), start=1):
                if not line.strip():
                    continue
                where = f"{file}:{number}"
                try:
                    row = _parse(line, where)
                except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
                    warnings.append(f"{where}: not a whole row, skipped ({_brief(error)})")
                    continue
                rows[machine_of(row), row.key] = row
    return list(rows.values()), warnings


def migrate(
    record: dict[str, Any],
    version: int,
    target: int = SCHEMA_VERSION,
    migrations: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = MIGRATIONS,
) -> dict[str, Any]:
    """A stored row brought from schema `version` to `target`, step by step.

    Raises `ValueError` if a step is missing.
    """
    for step in range(version, target):
        if step not in migrations:
            raise ValueError(f"no migration from schema version {step}")
        record = {**migrations[step](record), "schema_version": step + 1}
    return record


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [*sorted(path.glob(FILE_NAME)), *sorted(path.glob(f"*/{FILE_NAME}"))]
    if path.exists():
        return [path]
    if path.suffix == ".jsonl":
        raise UserError(f"{path}: no such file. Name a results folder or one of its {FILE_NAME} files")
    return []


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            _lock(file.fileno(), fcntl.LOCK_SH)
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read rows ({error.strerror}). Check the path and its permissions") from error


def _parse(line: bytes, where: str) -> Row:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    version = record.get("schema_version")
    if type(version) is not int:
        raise ValueError("no schema_version")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{where}: written by a newer workbench (row schema {version}; this one reads up to {SCHEMA_VERSION}). "
            "Upgrade the workbench, or name results without this file"
        )
    row: Row = from_json(Row, migrate(record, version))
    # from_json trusts its input; a name that is no text would surface much later, far from this line.
    for part in (row, row.artifact, row.workload):
        for field in dataclasses.fields(part):
            kind = {"str": str, "int": int}.get(str(field.type))
            if kind and not isinstance(getattr(part, field.name), kind):
                raise ValueError(f"{field.name} is not {kind.__name__}")
    return row


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _lock(file: int, kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        # Some network file systems have no locks. One O_APPEND write is then all the safety there is,
        # and losing the measurement would be worse.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _sync_folder(folder: Path) -> None:
    # A new file's name is not durable until its folder is synced; not every file system lets one do so.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
