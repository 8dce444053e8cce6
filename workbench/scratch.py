"""Folders that are of no use once their maker is dead, and how to tell.

Who works in such a folder holds a lock on it, which ends with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from workbench.disk import remove
from workbench.errors import UserError

PREFIX = "workbench-"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """A folder, made if need be, that nobody sweeps meanwhile; afterwards it is removed unless it was renamed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # Not every network's disk locks folders; then nothing is swept there.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody may have swept it before it was held.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove(folder)
        os.close(descriptor)


def temporary() -> contextlib.AbstractContextManager[Path]:
    """A folder for a worker's temporary files, and for what its engine leaves there.

    Short, as engines make sockets in it, whose names may have 107 characters.
    """
    try:
        return held(Path(tempfile.mkdtemp(prefix=PREFIX)))
    except OSError as error:
        raise UserError(f"no folder for temporary files ({error.strerror}): set TMPDIR to one of yours") from None


def sweep_dead(logs: Path) -> None:
    """Remove the unfinished folders of logs, and this user's folders of temporary files, that nobody holds."""
    folders = list(logs.glob("*.partial"))
    with contextlib.suppress(OSError):
        folders += Path(tempfile.gettempdir()).glob(f"{PREFIX}*/")
    for folder in folders:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(folder)
            finally:
                os.close(descriptor)
