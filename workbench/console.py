"""What the person sees while work goes on: a bar a step on a terminal, below a table that grows; a line a step in a
log."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from workbench.disk import remove_halves, write_whole
from workbench.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

LINE_EVERY_S = 30.0
NO_BUG = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP"),
        *("ENAMETOOLONG", "EMFILE", "ENFILE", "ESTALE", "ETXTBSY", "ENOLCK"),
    )
)
"""What a disk, its rights and its limits answer whatever the program does."""
Growing = Callable[[int, int], Sequence[tuple[str, str | None]]]
"""A table while its rows come: (width, height) of the room for it, in characters -> its lines and their styles."""
CANNOT_DRAW = ("dumb", "unknown")
"""Terminals without a cursor to steer: they get a log's lines."""
AROUND = 4
"""Lines of a terminal that no table may take: one above it, bar, how far all of the work is, and the cursor's."""


class Console:
    """A `Show` that draws on standard error, so that standard output stays the answer."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.live = sys.stderr.isatty() and os.environ.get("TERM") not in CANNOT_DRAW and not quiet
        self.whole = ""
        self.table: Growing | None = None

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            _tell(text)

    @contextlib.contextmanager
    def task(self, text: str, told: bool = True) -> Iterator[Callable[[float, float, str], None]]:
        """A step of the work; yields `progress(done, total, detail)` and, if it is to be `told`, says how long it
        took."""
        started = time.monotonic()
        if not self.live:
            yield self._lines(text, started)
        else:
            with _bar(text, self) as bar:
                task = bar.add_task("", total=None, name=text, detail="")

                def progress(done: float, total: float, detail: str) -> None:
                    bar.update(task, completed=done, total=total, detail=detail)

                yield progress
        if told:
            self.say(f"{text}: {seconds(time.monotonic() - started)}")

    def put_away(self, keep: bool) -> None:
        """The work is over: nothing stands around a step any more. What is to be kept of the table stays to be read."""
        if keep and self.live and self.table:
            from rich.console import Console as Terminal

            for line, _style in self.table(Terminal(stderr=True).width, sys.maxsize):
                self.say(line)
        self.whole, self.table = "", None

    def _lines(self, text: str, started: float) -> Callable[[float, float, str], None]:
        """In a log: how far a step is, every half minute."""
        said = started

        def progress(done: float, total: float, detail: str) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= LINE_EVERY_S and total:
                said = now
                left = f", about {seconds((now - started) * (total / done - 1))} left" if done else ""
                told = "; ".join(filter(None, [detail, self.whole]))
                self.say(f"{text}: {done / total:.0%} after {seconds(now - started)}{left} ({told})")

        return progress


def _bar(text: str, show: Show) -> Progress:
    """A bar on standard error, of one line whatever the terminal's width: words are cut before bar and times are. The
    table that `show` has, if any, stands above, and how far all of the work is below."""
    from rich import progress as rich
    from rich.console import Console as Terminal
    from rich.table import Column
    from rich.text import Text

    class Bar(rich.Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            if show.table:
                yield Text()
                for line, style in show.table(terminal.width, terminal.height - AROUND):
                    yield Text(line, style=style or "", no_wrap=True, overflow="ellipsis")
            yield from super().get_renderables()
            if show.whole:
                yield Text(f"  {show.whole}", style="dim", no_wrap=True, overflow="ellipsis")

    def words(field: str, most: int) -> rich.TextColumn:
        cut = Column(no_wrap=True, overflow="ellipsis", max_width=max(most, 1))
        return rich.TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=cut)

    terminal = Terminal(stderr=True)
    bar = 40 if terminal.width > 140 else 12
    room = terminal.width - bar - len("* 0:00:00 left 0:00:00") - 3
    name = min(len(text), room - 18)
    columns = (
        rich.SpinnerColumn(),
        words("name", name),
        rich.BarColumn(bar),
        words("detail", room - name),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
    )
    # Four frames a second: drawing faster would take time from what is measured.
    return Bar(*columns, console=terminal, transient=True, refresh_per_second=4)


def seconds(span_s: float) -> str:
    """`12.3 s`, `4 min 10 s`."""
    return f"{span_s:.1f} s" if span_s < 90 else f"{int(span_s // 60)} min {int(span_s % 60)} s"


def write(output: Path | None, content: str | bytes) -> None:
    """Write the answer to a file, or without one to standard output. Raises `UserError` if the file cannot be."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists() and not output.is_file():
            output.write_bytes(data)  # A pipe or a device.
        else:
            remove_halves(output.parent)
            write_whole(output, data)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}). Name another --output") from None


class Show(Protocol):
    """Where the work tells what it does."""

    whole: str
    """How far all of the work is, shown below the step it is at."""
    live: bool
    """Whether anything is drawn: on a terminal."""
    table: Growing | None
    """What was measured so far, drawn above the step."""

    def say(self, text: str) -> None: ...
    def task(self, text: str, told: bool = True) -> Any: ...
    def put_away(self, keep: bool) -> None: ...


def command(app: Callable[[], object]) -> None:
    """Run a command line: a `UserError`, or a disk that refuses, is one line and exit code 2; failed work is 1, an
    interrupt 130, a pipe that nobody reads 141, as where a signal ends a program."""
    _open_streams()
    before = sys.stdout
    code: int | str | None = 0
    try:
        app()
    except SystemExit as stop:
        code = stop.code
        if sys.stdout is not before:  # typer's way to say that a pipe is closed
            code = 141
        if code == 130:
            # typer ends an interrupted command with this code and without a word.
            _tell("\ninterrupted; what came to its end is kept, and the same command goes on from there")
    except (UserError, WorkFailed) as error:
        _tell(f"error: {error}")
        code = 2 if isinstance(error, UserError) else 1
    except OSError as error:
        code = _refused(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _refused(error)
    sys.exit(code)


def _refused(error: OSError) -> int:
    """Say what a disk or a pipe refused; the exit code."""
    if error.errno == errno.EPIPE:
        _drop(sys.stdout)
        return 141
    if error.errno not in NO_BUG:
        raise error
    from workbench.home import home

    if not error.filename:
        _drop(sys.stdout)
    where = str(error.filename or "standard output")
    cure = "Set WORKBENCH_HOME to a folder of yours" if where.startswith(str(home())) else "Name another place for it"
    _tell(f"error: {where}: {error.strerror}. {cure}, or mend that")
    return 2


def _open_streams() -> None:
    """Standard streams that take any text; a closed one's number must not become that of a file of results."""
    if sys.stdout is None or sys.stderr is None:
        for number in range(3):
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the program ends)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is None:
        _tell("error: standard output is closed. Send it to /dev/null if it is not wanted")
        sys.exit(2)


def _tell(text: str) -> None:
    """One line; where it cannot be written there is no reason to lose the work."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)


def _drop(stream: TextIO) -> None:
    """Let what is written to a stream from here on go nowhere, and what it still holds at the end too."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
