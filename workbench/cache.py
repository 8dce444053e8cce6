"""The cache as a whole: in use, cleaned, swept of what dead runs left, verified."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from workbench.console import Show
from workbench.disk import remove, remove_halves
from workbench.errors import UserError, unknown
from workbench.home import Kind, home, lock, record_name
from workbench.intact import Changed, as_made, contents
from workbench.records import (
    Artifact,
    Bandwidth,
    GramMatrices,
    ImportanceMatrix,
    PreparedBase,
    Prices,
    Reference,
    Tasks,
    TokenSets,
    digest,
)
from workbench.scratch import sweep_dead
from workbench.sizes import size_text

RECORDS: dict[Kind, type] = {
    "artifacts": Artifact,
    "bandwidth": Bandwidth,
    "bases": PreparedBase,
    "grams": GramMatrices,
    "imatrix": ImportanceMatrix,
    "prices": Prices,
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

    if not home().exists():
        return 0
    with _alone():
        targets = _leftovers()
        if everything:
            targets += [home() / name for name in NOTES + get_args(Kind)]
            _removed([file for file in (home() / "locks").iterdir() if file != _lock_file()])
        return _removed(targets)


def _leftovers() -> list[Path]:
    """Folders of unfinished work, and of what nobody needs any more."""
    partial = [path for kind in get_args(Kind) for path in (home() / kind).glob("*.partial")]
    return [*(home() / name for name in LEFTOVERS), *partial]


def unfinished() -> int:
    """Bytes that `clean` would free."""
    return sum(map(_bytes, _leftovers()))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    def busy() -> None:
        raise UserError(f"{home()}: a run is at work here. Clean when it has ended")

    with lock(_lock_file(), busy):
        yield


def _removed(targets: list[Path]) -> int:
    """Remove files and folders; the bytes freed."""
    freed = 0
    for target in targets:
        freed += _bytes(target)
        remove(target)
    return freed


def _bytes(path: Path) -> int:
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file())


@dataclass(frozen=True)
class Held:
    """What the cache holds: a base, an artifact, an importance matrix, ..."""

    folder: Path
    what: str
    recipes: frozenset[str]
    """For which it was made; of what several share, as far as artifacts tell."""
    size_bytes: int
    made_s: float
    """When, in seconds since 1970."""
    causes: frozenset[tuple[str, object]]
    """Base, source and calibration tokens that it is of."""


def held() -> list[Held]:
    """All that was made and is kept. An artifact names the recipe that made it first; what it was made from is of the
    same recipe."""
    found = [
        _held(kind, folder)
        for kind in get_args(Kind)
        for folder in sorted((home() / kind).glob("*"))
        if folder.suffix != ".partial"
    ]
    users: dict[tuple[str, object], set[str]] = {}
    for each in found:
        for cause in each.causes:
            users.setdefault(cause, set()).update(each.recipes)
    return [
        each if each.recipes else replace(each, recipes=frozenset().union(*(users[cause] for cause in each.causes)))
        for each in found
    ]


def _held(kind: Kind, folder: Path) -> Held:
    file, told = folder / record_name(kind), dict[str, Any]()
    with contextlib.suppress(Changed):
        told, _ = contents(file)
    origin = told.get("provenance", {}) if kind == "artifacts" else told
    source, recipe = origin.get("source"), origin.get("recipe") if kind == "artifacts" else None
    causes = {"base": origin.get("base"), "source": source and digest(source), "tokens": origin.get("calibration")}
    names = {
        "artifacts": f"{told.get('variant')} ({told.get('format')})",
        "bases": f"base {Path(told.get('path', '')).name}",
    }
    return Held(
        folder=folder,
        what=names.get(kind, kind) if told else f"{kind}, unreadable",
        recipes=frozenset({recipe} if recipe else ()),
        size_bytes=_bytes(folder),
        made_s=(file if file.exists() else folder).lstat().st_mtime,
        causes=frozenset((name, cause) for name, cause in causes.items() if cause),
    )


def forget(recipe: str) -> int:
    """Remove what was made for the recipe of that name and for no other; the bytes freed.

    Raises `UserError` for a name that nothing was made for, and if anybody is at work here.
    """
    with _alone():
        found = held()
        if not any(recipe in each.recipes for each in found):
            raise unknown("recipe", recipe, {name for each in found for name in each.recipes}, str(home()))
        return _removed([each.folder for each in found if each.recipes == {recipe}])


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
