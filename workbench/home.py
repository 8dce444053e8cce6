"""Where the program keeps things outside the repository, and how two runs share it.

Everything is under `$WORKBENCH_HOME` (default: the platform's cache folder). What is made once is in a folder a kind
(`Kind`), each entry a folder named by the digest of what determined it, written under a temporary name and renamed
when whole. A name that exists is therefore complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar, get_args

from workbench.disk import disk_faults, expanded, write_whole
from workbench.errors import UserError, short
from workbench.records import from_json, to_json

Record = TypeVar("Record")
Kind = Literal["artifacts", "bandwidth", "bases", "imatrix", "references", "tasks", "tokens"]
"""What is made once and kept, each kind in a folder of that name."""
LEFTOVERS = ("logs", "states")
"""Folders that nobody needs once no run goes on: logs of workers, states of interrupted passes."""
NOTES = ("locks", "nights")
"""Folders of notes about runs that go on, or that the next one takes up."""


def home() -> Path:
    """`$WORKBENCH_HOME`, or `workbench` in the platform's cache folder."""
    chosen = os.environ.get("WORKBENCH_HOME")
    if chosen:
        try:
            found = expanded(chosen).resolve()
            found.exists()
        except OSError as error:
            raise UserError(f"WORKBENCH_HOME={short(chosen)}: no folder ({error.strerror}): name another") from None
        return found
    import platformdirs

    return Path(platformdirs.user_cache_dir("workbench"))


def portable(text: str) -> str:
    """`text` with this machine's cache folder written `$WORKBENCH_HOME`, and its user's own folder `~`."""
    for folder, name in ((home(), "$WORKBENCH_HOME"), (Path.home(), "~")):
        if folder != folder.parent:
            text = name.join(re.split(re.escape(str(folder)) + r"(?![\w.-])", text))
    return text


def local(path: str) -> Path:
    """Where a stored row's path, as `portable` writes it, is on this machine; there or not."""
    return Path(os.path.expanduser(path.replace("$WORKBENCH_HOME", str(home()), 1)))


def instance() -> str:
    """Six hex digits that tell this installation from another on the same kind of machine."""
    file = home() / "instance"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # Linked when whole: another run may ask at the same moment and must not read an empty name.
        temporary = file.with_name(f"instance.{os.getpid()}")
        temporary.write_text(uuid.uuid4().hex[:6] + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
        temporary.unlink()
    return file.read_text().strip()


def interpreter(backend: str, default: str) -> str:
    """The Python that runs a backend on this machine.

    `WORKBENCH_PYTHON_<BACKEND>` in the environment, then `[python]` in `$WORKBENCH_HOME/config.toml`,
    then `default`.
    """
    chosen = os.environ.get(f"WORKBENCH_PYTHON_{backend.upper()}")
    if chosen:
        return chosen
    file = home() / "config.toml"
    if not file.exists():
        return default
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    pythons = settings.get("python", {})
    chosen = pythons.get(backend, default) if isinstance(pythons, dict) else None
    if not isinstance(chosen, str):
        raise UserError(f'{file}: [python] holds one line a backend, such as {backend} = "/path/to/bin/python"')
    return chosen


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file; `waiting` is called once if somebody else holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def machine_lock(waiting: Callable[[], None] | None = None) -> contextlib.AbstractContextManager[None]:
    """One heavy thing at a time on this machine, whatever its `$WORKBENCH_HOME`: measurements are disturbed
    by anything else."""
    return lock(Path(tempfile.gettempdir()) / f"workbench-{os.getuid()}.lock", waiting)


def entry(kind: Kind, key: str, record: type[Record], make: Callable[[Path], Record]) -> tuple[Path, Record]:
    """The cache folder `kind/key`, made by `make(folder)` if it is not there yet, and its record.

    `make` writes files into the folder it is given and returns the record stored beside them as
    `<kind's singular>.json`. What fails leaves its folder under a `.partial` name, where work that can be
    resumed is taken up again. Raises whatever `make` raises; a full disk becomes a `UserError`.
    """
    final = home() / kind / key
    with lock(home() / "locks" / f"{kind}-{key}"):
        found = stored(kind, key, record)
        if found is None:
            partial = final.with_name(f"{key}.partial")
            partial.mkdir(parents=True, exist_ok=True)
            with disk_faults(partial):
                found = make(partial)
                write_whole(partial / _record_name(kind), json.dumps(to_json(found), indent=1))
                if final.exists():
                    shutil.rmtree(final)
                partial.rename(final)
    return final, found


def stored(kind: Kind, key: str, record: type[Record]) -> Record | None:
    """The record of the cache folder `kind/key`; None if there is none, or half of one, or one of another shape."""
    try:
        found: Record = from_json(record, json.loads((home() / kind / key / _record_name(kind)).read_text()))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return found


def _record_name(kind: Kind) -> str:
    return f"{kind.rstrip('s')}.json"


def remember(recipe: Path) -> None:
    """Note the recipe last quantized here, for `workbench profile` without one."""
    try:
        with disk_faults(home()):
            home().mkdir(parents=True, exist_ok=True)
            write_whole(home() / "last-recipe", f"{recipe.resolve()}\n")
    except OSError as error:
        # The first thing a run writes; what is wrong with the place shows here.
        raise UserError(
            f"{home()}: cannot be written ({error.strerror}): set WORKBENCH_HOME to a folder of yours"
        ) from None


def last_recipe() -> Path | None:
    """The recipe last quantized on this machine, if any."""
    file = home() / "last-recipe"
    return Path(file.read_text().strip()) if file.exists() else None


def recipe_or_last(given: Path | None) -> Path:
    """The recipe that was given, or else that last quantized here. Raises `UserError` if there is none any more."""
    last = given or last_recipe()
    if last is None:
        raise UserError("no recipe was quantized here yet: run `workbench quantize RECIPE`, or name a recipe")
    if given is None and not last.exists():
        raise UserError(f"{last}: the recipe last quantized here is gone; name a recipe")
    return last


def clean(everything: bool) -> int:
    """Remove unfinished work and leftovers, or every folder that the program makes; the bytes freed."""
    targets = [home() / name for name in (*LEFTOVERS, *(NOTES + get_args(Kind) if everything else ()))]
    targets += [path for kind in get_args(Kind) for path in (home() / kind).glob("*.partial")]
    freed = 0
    for target in targets:
        if target.exists():
            freed += sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            shutil.rmtree(target)
    return freed
