"""The cache as a whole: in use, cleaned, swept of what dead runs left, verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from workbench.console import Show
from workbench.disk import remove, remove_halves
from workbench.errors import UserError
from workbench.home import Kind, home, lock, record_name
from workbench.intact import Changed, as_made, contents
from workbench.records import Artifact, Bandwidth, ImportanceMatrix, PreparedBase, Reference, Tasks, TokenSets
from workbench.scratch import sweep_dead
from workbench.sizes import size_text

RECORDS: dict[Kind, type] = {
    "artifacts": Artifact,
    "bandwidth": Bandwidth,
    "bases": PreparedBase,
    "imatrix": ImportanceMatrix,
    "references": Reference,
    "tasks": Tasks,
    "tokens": TokenSets,
}
LEFTOVERS = ("logs", "states")
"""Folders that nobody needs once no run goes on: logs of workers, states of interrupted passes."""
NOTES = ("compiled", "nights")
"""Folders of what the next run takes up: compiled kernels, notes."""
KEPT_S = 7 * 24 * 3600.0
"""For how long an interrupted pass is kept to be gone on with."""


class _Busy(Exception):
    pass


def _lock_file() -> Path:
    return home() / "locks" / "at-work"


@contextlib.contextmanager
def at_work(say: Callable[[str], None]) -> Iterator[None]:
    """For whoever needs what the cache holds to stay; any number at once. What dead ones left is swept first."""

    def busy() -> None:
        raise _Busy

    with contextlib.suppress(_Busy), lock(_lock_file(), busy):
        _sweep()
    with lock(_lock_file(), lambda: say("waiting for the cache to be cleaned"), shared=True):
        yield


def _sweep() -> None:
    """Remove what runs that are dead left and no other goes on with; nobody else is at work."""
    sweep_dead(home() / "logs")
    fresh = [state for state in (home() / "states").glob("*") if time.time() - state.stat().st_mtime < KEPT_S]
    for state in set((home() / "states").glob("*")) - set(fresh):
        remove(state)
    for kind in get_args(Kind):
        # Of artifacts, an interrupted pass has its own there.
        for partial in [] if kind == "artifacts" and fresh else (home() / kind).glob("*.partial"):
            remove(partial)
    remove_halves(home())


def clean(everything: bool) -> int:
    """Remove unfinished work and leftovers, or every folder that the program makes; the bytes freed.

    Raises `UserError` if anybody is at work here.
    """

    def busy() -> None:
        raise UserError(f"{home()}: a run is at work here. Clean when it has ended")

    if not home().exists():
        return 0
    with lock(_lock_file(), busy):
        targets = [home() / name for name in (*LEFTOVERS, *(NOTES + get_args(Kind) if everything else ()))]
        targets += [path for kind in get_args(Kind) for path in (home() / kind).glob("*.partial")]
        if everything:
            targets += set((home() / "locks").iterdir()) - {_lock_file()}
        freed = 0
        for target in targets:
            freed += sum(file.lstat().st_size for file in [target, *target.rglob("*")] if file.is_file())
            remove(target)
    return freed


def verify(show: Show) -> int:
    """Read everything through that the cache holds, and what it is of; print what is not as it was made, and what to
    do; 1 if anything is."""
    with at_work(show.say):
        files = [
            (folder / record_name(kind), RECORDS[kind])
            for kind in get_args(Kind)
            for folder in sorted((home() / kind).glob("*"))
            if folder.suffix != ".partial"
        ]
        total, done, broken = sum(_size(file) for file, _ in files), 0, 0
        with show.task("verify") as progress:
            for file, record in files:

                def read(count: int, name: str = f"{file.parent.parent.name}/{file.parent.name}") -> None:
                    nonlocal done
                    done += count
                    progress(done, total, f"{name}, {size_text(done)} of {size_text(total)}")

                try:
                    as_made(file, record, read)
                except Changed as fault:
                    broken += 1
                    cure = "restore it, or fetch it again" if fault.theirs else "the next run makes it anew"
                    print(f"{fault}: {cure}")
    print(f"{len(files)} entries, {size_text(total)}: {broken or 'none'} of them not as they were made")
    return 1 if broken else 0


def _size(file: Path) -> int:
    try:
        _, prints = contents(file)
    except Changed:
        return 0
    return sum(each.size for each in (prints or {}).values())
