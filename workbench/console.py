"""What the person sees while work goes on: a bar a step on a terminal, a line a step in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from workbench.errors import UserError

LINE_EVERY_S = 30.0


class Console:
    """A `Show` that draws on standard error, so that standard output stays the answer."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def task(self, text: str) -> Iterator[Callable[[float, float, str], None]]:
        """A step of the work; yields `progress(done, total, detail)` and tells how long it took."""
        started = time.monotonic()
        if not self._live:
            yield self._lines(text, started)
            self.say(f"{text}: {_seconds(time.monotonic() - started)}")
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = [
            SpinnerColumn(),
            TextColumn("{task.fields[name]}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        # Four frames a second: drawing faster would take time from what is measured.
        with Progress(*columns, console=Terminal(stderr=True), transient=True, refresh_per_second=4) as bar:
            task = bar.add_task("", total=None, name=text, detail="")

            def progress(done: float, total: float, detail: str) -> None:
                bar.update(task, completed=done, total=total, detail=detail)

            yield progress
        self.say(f"{text}: {_seconds(time.monotonic() - started)}")

    def _lines(self, text: str, started: float) -> Callable[[float, float, str], None]:
        """In a log: how far a step is, every half minute."""
        said = started

        def progress(done: float, total: float, detail: str) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= LINE_EVERY_S and total:
                said = now
                left = f", about {_seconds((now - started) * (total / done - 1))} left" if done else ""
                self.say(f"{text}: {done / total:.0%} after {_seconds(now - started)}{left} ({detail})")

        return progress


def _seconds(span_s: float) -> str:
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
        output.write_bytes(data)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}). Name another --output") from None


class Show(Protocol):
    """Where the work tells what it does."""

    def say(self, text: str) -> None: ...
    def task(self, text: str) -> Any: ...
