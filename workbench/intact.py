"""Records, and whether the files they are of are still what they were when they were made.

Of each file its record keeps size, times of change, a checksum of a few blocks and one of the whole. Before use the
first three are looked at, which takes no part of the time that loading takes; who wrote into the file since has changed
its times, and then it is read through. The blocks are for those who leave the times as they were: a power cut, a
restored disk image. `workbench cache verify` always reads through.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from workbench.disk import sync, write_whole
from workbench.records import digest, from_json, to_json

Record = TypeVar("Record")
Read = Callable[[int], object]
"""Told of bytes as they are read."""

BLOCK_BYTES = 4096
BLOCKS = 16
"""How many are looked at, the first and the last among them: a hole of a sixteenth of the file cannot lie between."""


@dataclass(frozen=True)
class Print:
    """A file as it was."""

    size: int
    times: list[int]
    """Of the last change of its content and of its inode, ns; the latter no program sets back."""
    blocks: str
    whole: str
    """Checksums (XXH3, 128 bits)."""


class NotAFile(OSError):
    """A folder, a pipe, a device."""


def open_file(path: Path) -> int:
    """A descriptor to read a file by. Raises `OSError`; `NotAFile` for what could be waited for, or has no content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFile("not a file")
    return descriptor


def print_of(path: Path, read: Read | None = None) -> Print:
    """The file's print as it is now; `read` is told of bytes on the way. Raises `OSError` if it cannot be read."""
    with open(open_file(path), "rb", buffering=0) as file:
        status, whole = os.fstat(file.fileno()), xxhash.xxh3_128()
        while block := file.read(1 << 22):
            whole.update(block)
            if read is not None:
                read(len(block))
        blocks = _blocks(file.fileno(), status.st_size)
        return Print(status.st_size, [status.st_mtime_ns, status.st_ctime_ns], blocks, whole.hexdigest())


def change(path: Path, was: Print, read: Read | None = None) -> tuple[str | None, Print]:
    """In which way a file is not what it was, and None if it is; and its print with the times that it has now.

    Read through if its times changed, or for whom `read` tells of bytes on the way.
    """
    try:
        descriptor = open_file(path)
    except FileNotFoundError:
        return "it is gone", was
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})", was
    try:
        status = os.fstat(descriptor)
        if status.st_size != was.size:
            return f"it has {status.st_size} bytes for {was.size}", was
        same_times = [status.st_mtime_ns, status.st_ctime_ns] == was.times
        if same_times and _blocks(descriptor, was.size) != was.blocks:
            return "its content changed", was
    finally:
        os.close(descriptor)
    if same_times and read is None:
        return None, was
    try:
        found = print_of(path, read)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})", was
    return (None, found) if found.whole == was.whole else ("its content changed", was)


def _blocks(descriptor: int, size: int) -> str:
    found, most = xxhash.xxh3_128(), max(0, size - BLOCK_BYTES)
    for place in sorted({most * each // (BLOCKS - 1) // BLOCK_BYTES * BLOCK_BYTES for each in range(BLOCKS - 1)}):
        found.update(os.pread(descriptor, BLOCK_BYTES, place))
    found.update(os.pread(descriptor, BLOCK_BYTES, most))
    return found.hexdigest()


@dataclass(frozen=True)
class Sealed:
    """What a record keeps beside what it says."""

    files: dict[str, Print]
    """By their path in the folder of the record, or by their own where they are somebody else's."""
    digest: str
    """Of the record and of the above."""


MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
"""What of somebody else's folder a base may be."""
SEALED = "sealed"


class Changed(Exception):
    """In which way a record, or a file that it is of, is not what it was. `theirs`: a file that nobody here made."""

    def __init__(self, text: str, theirs: bool = False) -> None:
        super().__init__(text)
        self.theirs = theirs


def keep(file: Path, record: object) -> None:
    """Write the record of a folder that was just made, when all that is in there is on the disk."""
    folder, told = file.parent, to_json(record)
    paths = _files_of(file, told)
    for path in paths:
        if not _is_theirs(folder, path):
            sync(path)
    for inner in {path.parent for path in paths if path.is_relative_to(folder)}:
        sync(inner)
    seal(file, told, {_name(folder, path): print_of(path) for path in paths})
    sync(folder)


def as_made(file: Path, record: type[Record], read: Read | None = None) -> Record:
    """The record in a file. `read`: everything is read through, and it is told of the bytes.

    A record without checksums gets some. Raises `Changed` if it or a file that it is of is not what it was.
    """
    folder = file.parent
    told, prints = contents(file)
    try:
        found: Record = from_json(record, told)
        path = getattr(found, "path", "")
        if path and not (folder / path).exists():
            raise Changed(f"{folder / path} is gone")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Changed(f"{file} is no such record ({error})") from None
    if prints is None:
        with contextlib.suppress(OSError):
            seal(file, told, {_name(folder, path): print_of(path, read) for path in _files_of(file, told)})
        return found
    present = {}
    for name, was in prints.items():
        how, present[name] = change(folder / name, was, read)
        if how:
            if read is not None:
                # Found by reading through; whoever looks at times only is to find it too.
                with contextlib.suppress(OSError):
                    seal(file, told, prints | {name: replace(was, times=[])})
            theirs = _is_theirs(folder, folder / name) and (folder / name).exists()
            raise Changed(f"{folder / name} is not what it was when it was made: {how}", theirs)
    if present != prints:
        with contextlib.suppress(OSError):
            seal(file, told, present)
    return found


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Print] | None]:
    """The JSON of a record and its files' prints, if it has any. Raises `Changed` if it cannot be read."""
    try:
        with open(open_file(file), "rb") as stream:
            told = json.loads(stream.read())
        if SEALED not in told:
            return dict(told), None
        sealed: Sealed = from_json(Sealed, told.pop(SEALED))
        if sealed.digest != digest([told, sealed.files]):
            raise ValueError("it was changed")
    except FileNotFoundError:
        raise Changed(f"{file} is gone") from None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Changed(f"{file} cannot be read ({reason})") from None
    return told, sealed.files


def seal(file: Path, told: dict[str, Any], prints: dict[str, Print]) -> None:
    sealed = Sealed(prints, digest([told, prints]))
    write_whole(file, json.dumps(told | {SEALED: to_json(sealed)}, indent=1))


def _files_of(file: Path, told: dict[str, Any]) -> list[Path]:
    """All in the folder of a record but itself; and where a base is a folder of somebody else's, what it is of that."""
    found = [path for path in file.parent.rglob("*") if path != file and path.is_file() and path.suffix != ".partial"]
    place = Path(str(told.get("path", "")))
    if place.is_absolute() and place.is_dir() and not place.is_relative_to(file.parent):
        found += [path for path in place.iterdir() if path.suffix in MODEL_FILES and path.is_file()]
    return sorted(found)


def _name(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _is_theirs(folder: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())
