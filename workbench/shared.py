"""Entries of the cache in a store that several machines share (`$WORKBENCH_STORE`): made once, uploaded once, checked
after each download.

    STORE/<kind>/<key>/current.json              which upload is the entry, and its files
    STORE/<kind>/<key>/<upload>/<file>           the files of one upload, the entry's record among them

An upload has a folder of its own and is named by `current.json` when it is whole: two machines that made the same at
the same moment mix no files. What is fetched is a folder like any other, of which the record says what each file was:
`workbench.intact` reads it through before it is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from workbench.disk import disk_faults, remove
from workbench.errors import UserError
from workbench.intact import Changed, contents
from workbench.storage import file_system, make_folder, reaching

STORE = "WORKBENCH_STORE"
"""The variable that names the store: a URL, or a folder that all machines see."""
CURRENT = "current.json"
PRIVATE = ("bandwidth",)
"""Kinds of entries that are of one machine."""

_settled: set[str] = set()
"""Entries that are in a store, or do not belong there: not asked for again."""


def store() -> str | None:
    """The store's URL or folder, if this run has one."""
    return os.environ.get(STORE, "").rstrip("/") or None


@contextlib.contextmanager
def using(place: str | None) -> Iterator[None]:
    """While it lasts, what is made is shared there; None: as the environment says."""
    before = os.environ.get(STORE)
    try:
        if place:
            os.environ[STORE] = place if "://" in place else str(Path(place).absolute())
        yield
    finally:
        os.environ.pop(STORE, None)
        os.environ |= {STORE: before} if before is not None else {}


def fetch(kind: str, key: str, final: Path) -> bool:
    """Copy an entry from the store to where the cache has it; whether it was there."""
    place = place_of(kind, key)
    if place is None:
        return False
    with reaching(place, f"read {kind}", "--store"):
        files, path = file_system(place)
        try:
            said = json.loads(files.cat_file(f"{path}/{CURRENT}"))
            upload, names = str(said["upload"]), [str(name) for name in said["files"]]
        except FileNotFoundError:
            return False
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{place}/{CURRENT}: not as it was written. Remove that folder: it is made anew") from None
        print(f"fetching {kind}/{key} from {store()}", file=sys.stderr, flush=True)
        partial = final.with_name(f"{key}.fetched.partial")
        remove(partial)
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{place}/{CURRENT}: {name!r} is no file of an entry. Remove that folder")
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with disk_faults(partial):
                files.get_file(f"{path}/{upload}/{name}", str(target))
        partial.rename(final)
    _settled.add(place)
    return True


def offer(kind: str, key: str, final: Path, record: str, anew: bool = False) -> None:
    """Copy an entry of the cache to the store, unless it is there; `anew`: what was there was spoiled.

    `record`: the name of the entry's record. What is of files that are not the entry's own stays where it is.
    """
    place = place_of(kind, key)
    if place is None or (place in _settled and not anew):
        return
    with reaching(place, f"write {kind}", "--store"):
        files, path = file_system(place)
        if anew or not files.exists(f"{path}/{CURRENT}"):
            try:
                names = [*(contents(final / record)[1] or {}), record]
            except Changed as fault:
                raise UserError(str(fault)) from None
            if not any(Path(name).is_absolute() for name in names):
                upload = uuid.uuid4().hex
                for name in names:
                    target = f"{path}/{upload}/{name}"
                    make_folder(files, place, target.rpartition("/")[0])
                    files.put_file(str(final / name), target)
                _put(files, f"{path}/{CURRENT}", {"upload": upload, "files": names})
    _settled.add(place)


def installation() -> str | None:
    """Six hex digits of the store, which all machines that share it are one installation by; None without a store."""
    place = store()
    return _instance(place) if place else None


@lru_cache(maxsize=8)
def _instance(place: str) -> str | None:
    """Asked of a store once a process: every row has it."""
    with reaching(place, "read", "--store"):
        files, path = file_system(place)
        name = f"{path}/instance.json"
        for _ in range(2):
            try:
                return str(json.loads(files.cat_file(name))["instance"])
            except FileNotFoundError:
                make_folder(files, place, path)
                _put(files, name, {"instance": uuid.uuid4().hex[:6]})
                # Read again: of two that wrote it at once the later one counts for both.
    return None


def _put(files: Any, path: str, said: dict[str, object]) -> None:
    """Write a small file that is there whole or not at all, in folders too."""
    half = f"{path}.{uuid.uuid4().hex[:8]}.partial"
    files.pipe_file(half, json.dumps(said).encode())
    files.mv(half, path)
    files.invalidate_cache()


def place_of(kind: str, key: str) -> str | None:
    """Where the store has an entry, or would; None without a store, and for what is of one machine alone."""
    return f"{store()}/{kind}/{key}" if store() and kind not in PRIVATE else None
