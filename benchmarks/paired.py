"""What benchmarks of two sides share: a side as a process that answers when asked, and what their rounds say.

A machine drifts within seconds. So the sides take turns many times, a second or two each, and a round gives one ratio:
what both had to bear cancels (`rounds`). Where a difference of one or two percent is to be seen, that is too coarse:
then both are stopped and let go on in turn every few hundredths of a second (`sliced`), and the time in which a side
was stopped is taken off its own clock.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.report import speeds

PATHS = {"PYTHONPATH": os.pathsep.join(str(folder) for folder in Path(__file__).resolve().parents[1::-1])}
"""For a script's own processes: where the workbench and the benchmarks are."""

Side = Callable[[], dict[str, float]]
"""One turn: what was measured in it, by name."""


class Worker:
    """A script's `--worker` in a process of its own: idle until it is asked, then it prints one line of JSON."""

    def __init__(self, script: str, asked: dict[str, Any], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the worker)
        self._child = subprocess.Popen(
            [sys.executable, "-P", script, "--worker", json.dumps(asked)],
            env={**os.environ, **PATHS, **environment},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def __call__(self) -> dict[str, float]:
        assert self._child.stdin and self._child.stdout
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        for line in self._child.stdout:
            if line.startswith('{"'):
                return dict(json.loads(line))
        self._log.seek(0)
        sys.exit(f"the worker failed: {self._log.read()[-1500:]}")

    def close(self) -> None:
        """End it."""
        self._child.kill()
        self._child.wait()


def answer(turn: Side) -> None:
    """The worker's side: one turn for each line, until there are no more. The process then leaves at once."""
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)
    os._exit(0)


def rounds(theirs: Side, ours: Side, many: int) -> dict[str, list[tuple[float, float]]]:
    """(theirs, ours) of every round and name; who begins changes from round to round."""
    found: dict[str, list[tuple[float, float]]] = {}
    for turn in range(many):
        order = (theirs, ours) if turn % 2 == 0 else (ours, theirs)
        said = {side: side() for side in order}
        for name, value in said[theirs].items():
            found.setdefault(name, []).append((value, said[ours][name]))
    return found


SLICE_S = 0.05
"""Long beside the tenths of a millisecond that stopping a process takes, short beside a busy spell of a machine."""


class Stoppable:
    """A process that runs only while it is let. Its samples end with a mark in what it prints; `ended` knows them."""

    def __init__(self, command: list[str], environment: dict[str, str], ended: Callable[[bytes], bool]) -> None:
        self._ended, self._name = ended, command[0]
        self._stops: list[tuple[float, float]] = []
        self.marks: list[float] = []
        """When it came to its marks, on the clock of `time.perf_counter`, which all processes share."""
        self.said = b""
        self._child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.run(None)

    def run(self, limit_s: float | None) -> bool:
        """Let it go on until its next mark, for `limit_s` at the most; whether it came to a mark."""
        self._let()
        marked = False
        until = None if limit_s is None else time.perf_counter() + limit_s
        while not marked and (until is None or time.perf_counter() < until):
            marked = self._listen(until)
        self._child.send_signal(signal.SIGSTOP)
        now = time.perf_counter()
        self._stops.append((now, now))
        if marked:
            self.marks.append(now)
        return marked

    def _let(self) -> None:
        if self._stops:
            self._stops[-1] = (self._stops[-1][0], time.perf_counter())
            self._child.send_signal(signal.SIGCONT)

    def stopped_s(self, begin: float, end: float) -> float:
        """Seconds between two moments in which it was stopped."""
        return sum(max(0.0, min(end, until) - max(begin, since)) for since, until in self._stops)

    def rest(self) -> bytes:
        """Let it go on to its end; all that it ever printed."""
        assert self._child.stdout
        self._let()
        self.said += self._child.stdout.read()
        return self.said

    def _listen(self, until: float | None) -> bool:
        assert self._child.stdout
        left_s = None if until is None else max(0.0, until - time.perf_counter())
        if not select.select([self._child.stdout], [], [], left_s)[0]:
            return False
        said = os.read(self._child.stdout.fileno(), 1 << 16)
        if not said:
            sys.exit(f"{self._name} ended: {self.said[-1500:].decode(errors='replace')}")
        self.said += said
        return self._ended(said)

    def close(self) -> None:
        """End it, stopped or not."""
        self._child.kill()
        self._child.wait()


def sliced(sides: tuple[Stoppable, Stoppable], many: int) -> None:
    """`many` samples of both, at the same time and never together: a slice of one, a slice of the other."""
    for turn in range(many):
        running = list(sides) if turn % 2 == 0 else list(reversed(sides))
        while running:
            running = [side for side in running if not side.run(SLICE_S)]


def verdict(pairs: list[tuple[float, float]], limit: float) -> tuple[str, bool]:
    """A line on ours against theirs, and whether the median ratio of the rounds is within `limit` of 1."""
    ratios = [own / peer for peer, own in pairs]
    ratio, spread = statistics.median(ratios), speeds.interval(ratios)
    peer, own = (statistics.median(side) for side in zip(*pairs, strict=True))
    between = f"95 % {spread[0]:.3f} to {spread[1]:.3f}" if spread else "one round"
    return f"{peer:10.3f} {own:10.3f}   ratio {ratio:.3f} ({between})", abs(ratio - 1) <= limit
