"""Rows on disk: one JSON object a line in `<results>/<machine>/rows.jsonl`, only ever appended to.

A line is written by one `write` on a descriptor opened with O_APPEND, under an exclusive lock, and synced
before `append` returns: two writers cannot interleave, and a row that was reported as stored survives a
power cut. A process killed in the middle leaves at most one half line; the next `append` starts a new
line after it, and `read` skips it with a warning. Nothing is rewritten, so history stays whole and a
results folder merges in git like text. Rejected: SQLite (no diff, no merge, one writer on a network
file system), one file a row (thousands of files a year), rewrite-and-rename (loses a concurrent writer's
row).

A place may also be a URL of anything fsspec reaches (`s3://bucket/results`). Object storage cannot append, so
there each writing process has a file of its own, `rows-<time>-<random>.jsonl`: a longer one is uploaded under a
new name before the shorter one is removed, so that no two writers share a file and at every moment all rows
are there whole, some perhaps twice. Copied to a local folder, these files are read like any other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

import msgspec

from workbench.errors import UserError, unknown
from workbench.records import Row, digest, to_json
from workbench.report.border import row_of
from workbench.report.remote import append_remote, remote_contents, try_remote
from workbench.storage import brief

FILE_NAME = "rows.jsonl"
SEGMENTS = "rows-*.jsonl"
"""Files of single writers, as they are in object storage."""
MOST_WARNINGS = 10

Found = TypeVar("Found")
Place = Path | str
"""A folder of results, one of its files, or a URL of either."""


def machine_of(row: Row) -> str:
    """What the machine is made of, as a name; where a row does not say, the machine's own name, or a digest of all
    that it says."""
    return row.machine.hardware or row.machine.name or digest(row.machine)


def machine_named(rows: Iterable[Row], wanted: str) -> str:
    """The machine of that name, or of a folder of that name. Raises `UserError` with the nearest name."""
    rows = list(rows)
    found = next((machine_of(row) for row in rows if wanted in (machine_of(row), row.machine.name)), None)
    if found is None:
        raise unknown("machine", wanted, map(machine_of, rows), "results")
    return found


def append(results: Place, machine: str, row: Row) -> None:
    """Store one row durably under `results/machine`, creating the file if need be.

    Numbers that are not finite become null, because JSON has no NaN and every reader must get through.
    Raises `UserError` if the file cannot be written; it then is as it was before.
    """
    _append(results, machine, FILE_NAME, to_json(row), row.started_at)


def try_writing(results: Place, machine: str) -> None:
    """See to it that rows can be stored, before hours of work are done for them. Raises the `UserError` of `append`."""
    _check_name(machine)
    if _is_url(results):
        try_remote(f"{str(results).rstrip('/')}/{machine}")
        return
    path = _local(results) / machine / FILE_NAME
    with _storing(path):
        with contextlib.suppress(FileNotFoundError):
            os.close(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\n")
            file.flush()


def append_note(results: Place, machine: str, name: str, note: Mapping[str, object], stamp: str) -> None:
    """Store one JSON object durably as a line of `results/machine/<name>.jsonl`; `stamp` is its time."""
    _append(results, machine, f"{name}.jsonl", note, stamp)


def read_notes(results: Place, machine: str, name: str, kind: type[Found]) -> tuple[list[Found], list[str]]:
    """The lines of `append_note` as `kind`, each once, oldest first; and a warning for each that is none."""
    warnings: list[str] = []

    def note_of(line: bytes) -> tuple[bytes, Found]:
        return line.strip(), msgspec.json.decode(line, type=kind)

    contents = _contents(under(results, machine), f"{name}.jsonl", f"{name}-*.jsonl")
    return [*dict(_found(contents, note_of, "note", warnings)).values()], warnings


def _append(results: Place, machine: str, name: str, record: Any, stamp: str) -> None:
    _check_name(machine)
    text = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    line = text.encode("utf-8", "replace") + b"\n"  # the name of a file may hold what is no letter at all
    if _is_url(results):
        append_remote(f"{str(results).rstrip('/')}/{machine}", name, line, stamp)
        return
    path = _local(results) / machine / name
    with _storing(path):
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


def _check_name(machine: str) -> None:
    if not machine or machine in (".", "..") or any(mark in machine for mark in "/\\\0\n"):
        raise UserError(f"machine name {machine!r} cannot name a folder: use letters, digits, '-', '_' and '.'")


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    """What the system refuses within, as a `UserError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{path}: cannot store a row ({reason}). Free space, check permissions or name another --results"
        ) from error


def read(*places: Place) -> tuple[list[Row], list[str]]:
    """All rows of the given files and folders, and a warning for each line that had to be skipped.

    A folder stands for its `rows.jsonl` and for those one level below; one that does not exist holds no
    rows. Of rows with the same machine and key the newest wins (the last one read, of one moment) and keeps the first
    one's place.
    Raises `UserError` for a named file that is missing or unreadable, and for rows of a newer schema.
    """
    rows: dict[tuple[str, str], Row] = {}
    warnings: list[str] = []
    with _unwatched():
        for row in _rows(places, warnings):
            job = (machine_of(row), row.key)
            if job not in rows or row.started_at >= rows[job].started_at:
                rows[job] = row
    return list(rows.values()), warnings


def history(*places: Place) -> tuple[list[Row], list[str]]:
    """Every measurement ever stored, oldest first, and the warnings of `read`.

    A job measured on many nights has a row for each. All but the newest of each are lean: without further workload
    points, and without per-token lists where none is needed, since ten thousands of rows are held at once.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    newest: dict[tuple[str, str], Row] = {}
    warnings: list[str] = []
    with _unwatched():
        for row in _rows(places, warnings):
            job = (machine_of(row), row.key)
            last = newest.get(job)
            if last is None or row.started_at >= last.started_at:
                newest[job] = row
                if last is not None:
                    _slim(last)
            else:
                _slim(row)
            rows[*job, row.started_at] = row
    return sorted(rows.values(), key=lambda row: row.started_at), warnings


def few(warnings: list[str]) -> list[str]:
    """As many of the warnings of `read` as somebody reads, and how many more there are."""
    more = len(warnings) - MOST_WARNINGS
    return [*warnings[:MOST_WARNINGS], *([f"and {more} more lines that were skipped"] if more > 0 else [])]


def under(results: Place, machine: str) -> Place:
    """The folder of one machine's rows."""
    return f"{str(results).rstrip('/')}/{machine}" if _is_url(results) else Path(results) / machine


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """Rows hold no cycles: to look for some among millions of objects takes a quarter of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _rows(places: tuple[Place, ...], warnings: list[str]) -> Iterator[Row]:
    for place in places:
        yield from _found(_contents(place, FILE_NAME, SEGMENTS), row_of, "row", warnings)


def _found(
    contents: Iterable[tuple[str, Iterable[bytes]]], read: Callable[[bytes], Found], what: str, warnings: list[str]
) -> Iterator[Found]:
    """What `read` makes of each line; a warning for each of which it raises `ValueError`."""
    for file, lines in contents:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    yield read(line)
            except UserError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            except (ValueError, RecursionError) as error:
                warnings.append(f"{file}:{number}: not a whole {what}, skipped ({brief(error)})")


def _is_url(place: Place) -> bool:
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def _local(place: Place) -> Path:
    if isinstance(place, str) and place.startswith("file://"):
        return Path(unquote(urlparse(place).path))
    return Path(place)


def _contents(place: Place, name: str, segments: str) -> Iterator[tuple[str, Iterable[bytes]]]:
    """(where, lines) of every file that a place stands for."""
    if _is_url(place):
        yield from ((where, content.split(b"\n")) for where, content in remote_contents(str(place), name, segments))
        return
    try:
        files = _files(_local(place), name, segments)
    except OSError as error:
        raise UserError(f"{place}: cannot read rows ({error.strerror}). Check the path and its permissions") from error
    for path in files:
        yield str(path), _lines(path)


def _files(path: Path, name: str, segments: str) -> list[Path]:
    if path.is_dir():
        patterns = (name, segments, f"*/{name}", f"*/{segments}")
        return [file for pattern in patterns for file in sorted(path.glob(pattern)) if file.is_file()]
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"{path}: neither a folder nor a file of rows")
    if path.suffix == ".jsonl":
        raise UserError(f"{path}: no such file. Name a results folder or one of its {name} files")
    return []


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            _lock(file.fileno(), fcntl.LOCK_SH)
            yield from file
    except OSError as error:
        raise UserError(f"{path}: cannot read rows ({error.strerror}). Check the path and its permissions") from error


def _slim(row: Row) -> None:
    """Free what only the newest measurement of a job is asked for; nothing else holds the row yet."""
    measurement = row.measurement
    if measurement is None:
        return
    del measurement.speeds[1:], measurement.served[:]
    if measurement.serving is not None:
        del measurement.serving.points[:]
    for quality in measurement.qualities.values():
        for window in quality["windows"]:
            window.pop("kld", None)
            if not window["nonfinite"]:  # else a paired difference needs to know which tokens
                window.pop("nll", None)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


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
