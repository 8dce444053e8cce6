"""A disk that is full or too small, told before the work where that can be known."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from workbench.errors import UserError


def need_room(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(
            f"{folder}: {free / 2**30:.1f} GiB free, up to {need_bytes / 2**30:.1f} GiB needed. Free some space "
            "(`workbench clean` removes unfinished work and old artifacts) or set WORKBENCH_HOME to a larger disk."
        )


def disk_error(error: OSError, where: Path) -> UserError | None:
    """`ENOSPC` as a line for the user."""
    import errno

    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    free = shutil.disk_usage(where).free if where.exists() else 0
    return UserError(
        f"{where}: the disk is full ({free / 2**30:.1f} GiB free). Free some space (`workbench clean` removes "
        "unfinished work and old artifacts) or set WORKBENCH_HOME to a larger disk; finished work is kept."
    )


@contextmanager
def disk_faults(out: Path, kept: str = "") -> Iterator[None]:
    """Turn a full disk, or a quota reached, into a line about it; `kept` says what the work so far is good for."""
    kept = f" {kept}" if kept else ""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free_gb = shutil.disk_usage(out).free / 1e9
            raise UserError(
                f"no space left on the disk of {out} ({free_gb:.1f} GB free): free some, or set "
                f"WORKBENCH_HOME to a larger disk.{kept}"
            ) from None
        raise
    except Exception as error:  # safetensors raises its own type and keeps the system's words
        if "No space left" in str(error):
            raise UserError(
                f"no space left on the disk of {out}: free some, or set WORKBENCH_HOME to a larger disk.{kept}"
            ) from None
        raise


def need_space(out: Path, need_bytes: int) -> None:
    """`UserError` unless the disk has that many bytes free."""
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < need_bytes:
        raise UserError(
            f"preparing the base needs {need_bytes / 1e9:.1f} GB in {out}, which has "
            f"{free_bytes / 1e9:.1f} GB free: free some, or set WORKBENCH_HOME to a larger disk."
        )
