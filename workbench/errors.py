"""The one exception a user is meant to see, and the phrases it is made of.

`UserError` says what is wrong, where, and what to do next; the command line prints it as one line and
exits with 2. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|memoryerror|(cannot|can't|failed to) allocate|alloc(ation)?_failed|could not make a context"
    r"|n_seq_max|enough memory|no available memory|free memory on device",
    re.IGNORECASE,
)
"""Engines' and CUDA libraries' words for what does not fit into a memory; an exception's name among them."""
NOT_IMPORTED = (ImportError, OSError, RuntimeError)
"""What the import of an engine raises that is missing or broken. That a shared library cannot be loaded, Python says by
ImportError, torch by OSError, llama-cpp-python by RuntimeError."""
LONGEST = 60
"""Characters of a word, from a file or a command line, that a message repeats."""
LONGEST_PATH = 160
LONGEST_LIST = 150
"""Characters of a list of known names."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what, where, what to do."""

    def __init__(self, message: str) -> None:
        # It repeats what stood in files: nothing in it may break the line, or steer a terminal.
        super().__init__(message if message.isprintable() else "".join(map(_printable, message)))


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()


def short(word: object, longest: int = LONGEST) -> str:
    """What a message repeats of a word, a number or a path that may be of any length."""
    text = str(word)
    return text if len(text) <= longest else f"{text[: longest - 20]}...{text[-17:]}"


class WorkFailed(Exception):
    """A worker raised, hung, died or answered nonsense. The message is one line; the log it names has the rest."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that a memory is full. Not by its class: cuBLAS, cuSOLVER and cuDNN say so by
    `RuntimeError`."""
    return OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}") is not None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to "unknown <thing> 'word'": the nearest known name, or the whole list."""
    known = sorted(set(known))
    folded = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word).lower()[:LONGEST_LIST], folded, n=1, cutoff=0.6)
    if near:
        return f"Did you mean '{folded[near[0]]}'?"
    listed = ", ".join(known)
    if len(listed) > LONGEST_LIST:
        return f"Known: {listed[:LONGEST_LIST].rpartition(', ')[0]}, ..."
    return f"Known: {listed}." if known else ""


def unknown(thing: str, word: str, known: Iterable[str], where: str = "") -> UserError:
    """The error for a name that is not in a registry or a list; `where` prefixes it, as in `file: key`."""
    prefix = f"{where}: " if where else ""
    return UserError(f"{prefix}unknown {thing} '{short(word)}'. {did_you_mean(word, known)}".rstrip())


def check_known(thing: str, word: str, known: Iterable[str]) -> None:
    """Raise `UserError` for a name that is not in a registry or a list."""
    names = list(known)
    if word not in names:
        raise unknown(thing, word, names)


def install_with(what: str, command: str) -> UserError:
    """The error for an engine or library that is missing."""
    return UserError(f"{what} is not installed here. Install it with: {command}")


def cannot_import(what: str, error: Exception, command: str) -> UserError:
    """The error for a library whose import failed: it is missing, or what it was built against is not what is here."""
    if isinstance(error, ModuleNotFoundError):
        name = str(error.name)
        return install_with(what if name.lower() in what.lower() else f"{what} (module '{name}')", command)
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return UserError(f"{what} is installed but cannot be imported: {reason}. Install it anew with: {command}")


@contextlib.contextmanager
def importing(what: str, command: str) -> Iterator[None]:
    """Imports of a library that may be missing or broken. Raises `UserError` with the command that installs it."""
    try:
        yield
    except NOT_IMPORTED as error:
        raise cannot_import(what, error, command) from None
