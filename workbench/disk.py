"""Files that are there whole or not at all; paths as people write them; and a disk that is full or too small, told in
words and where possible before the work."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import LONGEST_PATH, UserError, short
from workbench.sizes import size_text

WAY_OUT = (
    "Free some space (`workbench clean` removes unfinished work and old artifacts) or set WORKBENCH_HOME to a larger "
    "disk."
)


HALF_S = 60.0
"""After how many seconds half a file is nobody's any more."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with its `~` spelt out. Raises `UserError` for `~name` where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{short(path)}: nobody of that name has a folder here; write the path in full") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name and rename it when it is on the disk, so that nobody ever reads half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_halves(folder: Path) -> None:
    """Remove what `write_whole` left in a folder where it was killed."""
    for half in folder.glob(".*.partial"):
        pid = re.fullmatch(r"\..+\.(\d+)\.partial", half.name)
        # The process may be another machine's, where a disk is shared; that long none takes.
        with contextlib.suppress(FileNotFoundError):
            if pid and not Path("/proc", pid[1]).exists() and half.stat().st_mtime < time.time() - HALF_S:
                half.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove whatever has that name, if anything has."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def need_room(folder: Path, need_bytes: int) -> None:
    """Raise `UserError` unless the disk of a folder has that many bytes free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < need_bytes:
        sizes = f"{size_text(free_bytes)} free, up to {size_text(need_bytes)} needed"
        raise UserError(f"{folder}: no space left for it ({sizes}). {WAY_OUT}")


@contextmanager
def disk_faults(where: Path, kept: str = "Finished work is kept.") -> Iterator[None]:
    """Turn a full disk, or a quota reached, into a `UserError`; `kept` says what the work so far is good for."""
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # safetensors raises its own type and keeps the system's words.
        by_safetensors = type(error).__name__ == "SafetensorError" and "No space left" in str(error)
        if code not in (errno.ENOSPC, errno.EDQUOT) and not by_safetensors:
            raise
        free = size_text(shutil.disk_usage(where).free) if where.exists() else "nothing"
        raise UserError(f"{where}: the disk is full ({free} free). {WAY_OUT} {kept}") from None


@contextmanager
def readable(where: Path) -> Iterator[None]:
    """Turn what keeps the files of a place from being read (permissions, folders and loops where files should be) into
    a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        said = short(error.filename or where, LONGEST_PATH)
        raise UserError(f"{said} cannot be read: {error.strerror or error}.") from None
