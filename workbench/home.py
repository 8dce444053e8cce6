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
import shlex
import sys
import tempfile
import time
import tomllib
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from workbench import shared
from workbench.disk import disk_faults, expanded, remove, sync, write_whole
from workbench.errors import UserError, short
from workbench.intact import Changed, NotAFile, as_made, keep, open_file

Record = TypeVar("Record")
Kind = Literal["artifacts", "bandwidth", "bases", "grams", "imatrix", "prices", "references", "tasks", "tokens"]
"""What is made once and kept, each kind in a folder of that name."""
OWN_GPUS = "WORKBENCH_OWN_GPUS"
"""The variable by which a step of a cluster has these GPUs (UUIDs) of its machine to itself, and others have theirs."""
STARTED = time.strftime("%Y-%m-%d %H:%M:%S")
"""When this program was."""
WAITING = "waiting for another workbench run"
"""And then who it is, by `holder`."""


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


def portable(value: Any) -> Any:
    """Plain JSON types with this machine's cache folder written `$WORKBENCH_HOME` and its user's own folder `~` in each
    of their texts, also where a message quotes them."""
    folders = {home(): "$WORKBENCH_HOME", Path.home(): "~", Path.home().resolve(): "~"}
    found = []
    for folder, name in folders.items():
        plain = str(folder)
        quoted = [repr(plain)[1:-1], json.dumps(plain)[1:-1], shlex.quote(plain).strip("'")]
        forms = sorted({plain, *quoted, urllib.parse.quote(os.fsencode(plain))}, key=len, reverse=True)
        if folder != folder.parent:
            found.append((re.compile(rf"(?:{'|'.join(map(re.escape, forms))})(?![\w.-])"), name))

    def told(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: told(item) for name, item in value.items()}
        if isinstance(value, list):
            return [told(item) for item in value]
        if isinstance(value, str):
            for pattern, name in found:
                value = name.join(pattern.split(value))
        return value

    return told(value)


def local(path: str) -> Path:
    """Where a stored row's path, as `portable` writes it, is on this machine; there or not."""
    return Path(os.path.expanduser(path.replace("$WORKBENCH_HOME", str(home()), 1)))


def installation() -> str:
    """Six hex digits that tell this installation from another on the same hardware: each measures for itself. Machines
    that share a store are one."""
    if common := shared.installation():
        return common
    file = home() / "instance"
    spoiled = os.path.lexists(file)  # Asked first: another run may make it at this moment.
    if not re.fullmatch("[0-9a-f]{6}", _line(file) or ""):
        file.parent.mkdir(parents=True, exist_ok=True)
        if spoiled:
            remove(file)
        # Linked when whole: another run may ask at the same moment and must not read an empty name.
        temporary = file.with_name(f"instance.{os.getpid()}")
        temporary.write_text(uuid.uuid4().hex[:6] + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
        temporary.unlink()
    return _line(file) or ""


def _line(file: Path) -> str | None:
    """What a file of one line says; None if there is none."""
    try:
        with open(open_file(file), encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().strip()
    except (FileNotFoundError, NotAFile):
        return None


def interpreter(backend: str, default: str) -> str:
    """The Python that runs a backend on this machine.

    `WORKBENCH_PYTHON_<BACKEND>` in the environment, then `[python]` in `$WORKBENCH_HOME/config.toml`,
    then `default`.
    """
    chosen = os.environ.get(f"WORKBENCH_PYTHON_{backend.upper().replace('-', '_')}")
    if chosen:
        return chosen
    file = home() / "config.toml"
    try:
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Give it back its rights, or remove it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid TOML: {error}") from None
    pythons = settings.get("python", {})
    chosen = pythons.get(backend, default) if isinstance(pythons, dict) else None
    if not isinstance(chosen, str):
        raise UserError(f'{file}: [python] holds one line a backend, such as {backend} = "/path/to/bin/python"')
    return chosen


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None, shared: bool = False, note: str = "") -> Iterator[None]:
    """Hold a lock on a file, alone or with all who share it; `waiting` is called once if somebody else holds it. `note`
    is what the file says meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    descriptor = _lock_file(path)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, kind)
        if note:
            with contextlib.suppress(OSError):  # Another user's file may only be read.
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, note.encode(errors="replace"), 0)
        yield
    finally:
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    """A descriptor of the file, which is made if need be; another user's will do, though it may only be read."""
    made = os.O_RDWR | os.O_CREAT | os.O_EXCL
    # Never O_CREAT for a file that is there: in a folder that everybody writes to, the kernel refuses another's.
    for flags in (os.O_RDWR, os.O_RDONLY, made, os.O_RDWR):
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            problem = error
            continue
        if flags == made:
            os.fchmod(descriptor, 0o666)  # Whatever the umask is: the machine's lock is everybody's.
        return descriptor
    raise problem


@contextlib.contextmanager
def machine_lock(waiting: Callable[[str], object] = lambda who: None, who: str = "") -> Iterator[None]:
    """One heavy thing at a time on this machine, whoever's it is and whatever its `$WORKBENCH_HOME`: measurements are
    disturbed by anything else. Where the file for it cannot be opened, one at a time in this home. A step of a cluster
    that has GPUs to itself shares the machine with others that have theirs.

    `waiting` is told who it is that is waited for, as that one says of itself (`who`); empty if it cannot.
    """
    file = Path(tempfile.gettempdir()) / "workbench.lock"
    try:
        os.close(_lock_file(file))
    except OSError:
        file = home() / "locks" / "machine"
    own = [file.with_name(f"{file.name}.{gpu}") for gpu in sorted(os.environ.get(OWN_GPUS, "").split(",")) if gpu]

    def held(by: Path) -> None:
        waiting(holder(by))

    with contextlib.ExitStack() as all_of_it:
        all_of_it.enter_context(lock(file, partial(held, file), shared=bool(own), note="" if own else who))
        for each in own:
            all_of_it.enter_context(lock(each, partial(held, each), note=who))
        yield


def who(step: str) -> str:
    """This run as another sees it that waits for it: process, command, recipe, since when, and the step it is at."""
    program, *words = sys.argv
    name = Path(program).stem.replace("__main__", "workbench")
    recipe = "" if any(word.endswith((".yaml", ".yml")) for word in words) else f" ({last_recipe() or 'no recipe'})"
    return f"pid {os.getpid()}, `{shlex.join([name, *words])}`{recipe} since {STARTED}, at {step}"


def holder(file: Path) -> str:
    """`: ` and what the holder of a lock wrote into its file; anybody may have written there."""
    with contextlib.suppress(OSError):
        descriptor = _lock_file(file)
        try:
            said = os.pread(descriptor, 500, 0).decode(errors="replace")
        finally:
            os.close(descriptor)
        return f": {said}" if said and said.isprintable() else ""
    return ""


def entry(kind: Kind, key: str, record: type[Record], make: Callable[[Path], Record]) -> tuple[Path, Record]:
    """The cache folder `kind/key` and its record, made by `make(folder)` if it is not there yet, or not as it was made,
    which is told.

    `make` writes files into the folder it is given and returns the record stored beside them as
    `<kind's singular>.json`. What fails leaves its folder under a `.partial` name, where work that can be
    resumed is taken up again. Raises whatever `make` raises; a full disk becomes a `UserError`.
    """
    final = home() / kind / key
    with _entry_lock(kind, key):
        spoiled = os.path.lexists(final)
        found = _found(kind, key, record)
        if found is None and shared.fetch(kind, key, final):
            found, spoiled = _found(kind, key, record), True
        anew = found is None and spoiled
        if found is None:
            half = final.with_name(f"{key}.partial")
            if not half.is_dir():
                remove(half)
            half.mkdir(parents=True, exist_ok=True)
            with disk_faults(half):
                found = make(half)
                keep(half / record_name(kind), found)
                half.rename(final)
                sync(final.parent)
        shared.offer(kind, key, final, record_name(kind), anew)
    return final, found


def stored(kind: Kind, key: str, record: type[Record]) -> Record | None:
    """The record of the cache folder `kind/key`; None if there is none, or not as it was made, which is told.

    Raises `UserError` if files of somebody else's, which it is of, changed: they cannot be made anew.
    """
    final = home() / kind / key
    if not os.path.lexists(final) and not shared.store():
        return None
    with _entry_lock(kind, key):
        if not os.path.lexists(final):
            shared.fetch(kind, key, final)
        return _found(kind, key, record)


def bring(path: str) -> None:
    """Have the entry here that a path of the cache lies in, if another machine made it; who reads it checks it."""
    if not Path(path).is_relative_to(home()):
        return
    folder, key, *_ = Path(path).relative_to(home()).parts
    for kind in get_args(Kind):
        if kind == folder and not os.path.lexists(home() / kind / key):
            with _entry_lock(kind, key):
                if not os.path.lexists(home() / kind / key):
                    shared.fetch(kind, key, home() / kind / key)


def _entry_lock(kind: Kind, key: str) -> contextlib.AbstractContextManager[None]:
    """While an entry is looked at or made; who waits for another to make it says so."""
    file = home() / "locks" / f"{kind}-{key}"

    def waiting() -> None:
        with contextlib.suppress(OSError):
            print(f"{WAITING}, which makes the same{holder(file)}", file=sys.stderr, flush=True)

    return lock(file, waiting, note=who(f"{kind}/{key}"))


def _found(kind: Kind, key: str, record: type[Record]) -> Record | None:
    folder = home() / kind / key
    try:
        return as_made(folder / record_name(kind), record)
    except Changed as fault:
        if fault.theirs:
            raise UserError(f"{fault}. Restore it; if the change is meant, `touch` it") from None
        if os.path.lexists(folder):
            with contextlib.suppress(OSError):
                print(f"warning: {fault}: made anew", file=sys.stderr, flush=True)
            remove(folder)
    return None


def record_name(kind: Kind) -> str:
    """The file of an entry's record."""
    return f"{kind.rstrip('s')}.json"


def remember(recipe: Path) -> None:
    """Note the recipe last quantized here, for `workbench profile` without one."""
    with disk_faults(home()):
        home().mkdir(parents=True, exist_ok=True)
        write_whole(home() / "last-recipe", f"{recipe.resolve()}\n")


def last_recipe() -> Path | None:
    """The recipe last quantized on this machine, if any."""
    found = _line(home() / "last-recipe")
    return Path(found) if found else None


def recipe_or_last(given: Path | None) -> Path:
    """The recipe that was given, or else that last quantized here. Raises `UserError` if there is none any more."""
    last = given or last_recipe()
    if last is None:
        raise UserError("no recipe was quantized here yet: run `workbench quantize RECIPE`, or name a recipe")
    if given is None and not last.exists():
        raise UserError(f"{last}: the recipe last quantized here is gone; name a recipe")
    return last
