"""The windows of a pass shared out over several devices of one machine, a process each (`helper.py`).

The layers of a pass depend on one another, its windows do not. So each process pushes a run of the windows through a
layer, and what is summed up over tokens (Gram matrices, of which all else is made, and how many tokens reached each
expert) is added to the first process's own, one process after another in the order of their windows: the same bytes
whenever there are as many of them. Only the first quantizes, writes and keeps the note; the others wait meanwhile.

Rejected: `torch.distributed`, whose processes find each other through sockets and whose sums are in an order of their
own; `multiprocessing`, which pickles. Windows dealt out as processes become free would save a little waiting, and the
sums would be in another order each time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from workbench.errors import UserError
from workbench.records import CalibrationRequest, to_json
from workbench.worker.calibration import helper
from workbench.worker.calibration.gram import Grams
from workbench.worker.calibration.helper import Line, Share, numbers_in
from workbench.worker.calibration.weights import Weights
from workbench.worker.calibration.windows import Windows


@dataclass(frozen=True)
class Team:
    """The other processes of a pass, and how many windows, from the first, are left to this one."""

    others: Sequence[_Other]
    own: int

    @contextmanager
    def at_work(self, index: int, part: int) -> Iterator[None]:
        """The others run their windows through that part of a layer while this process runs its own, with its share of
        the threads."""
        import torch

        if not self.others:
            yield
            return
        threads = torch.get_num_threads()
        for other in self.others:
            other.say([index, part])
        torch.set_num_threads(_each(threads, len(self.others) + 1))
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def add_up(self, grams: Grams, names: Sequence[str]) -> None:
        """Add what the others have of these inputs, in the order of their windows, and tell them the sums of counts."""
        found = [other.hear()["has"] for other in self.others]
        for name in names:
            for other, has in zip(self.others, found, strict=True):
                if name in has:
                    count, size = has[name]
                    other.hear()  # It lies there.
                    grams.take(name, other.numbers[: size * size].view(size, size), count)
                    other.say(None)
        counts = {name: grams.counts[name] for name in names if name in grams.counts}
        for other in self.others:
            other.say(counts)


@contextmanager
def team(
    request: CalibrationRequest, devices: Sequence[Any], precision: str, weights: Weights, windows: Windows
) -> Iterator[Team]:
    """A process for each device but the first, which is this one's; they are ended with the context, whatever they are
    at. Raises `UserError` where one is killed, and what one raises."""
    import torch

    (_, own), *shares = pairwise(cuts(windows.lengths, len(devices)))
    threads = _each(torch.get_num_threads(), len(devices))
    others: list[_Other] = []
    try:
        for number, ((first, end), device) in enumerate(zip(shares, devices[1:], strict=True), 2):
            name = f"process {number} of {len(devices)} of the calibration pass"
            share = Share(request.base, request.tokens, str(device), precision, threads, first, end)
            others.append(_Other(name, share, request.state, weights.widest))
        yield Team(others, own)
    finally:
        for other in others:
            other.end()


def cuts(lengths: Sequence[int], count: int) -> list[int]:
    """Where `count` runs of windows of these lengths begin, and where the last ends: of about as many tokens each, and
    of a window at least. There are no fewer windows than `count`."""
    ends, found = list(accumulate(lengths)), [0]
    for share in range(1, count):
        near = bisect_left(ends, ends[-1] * share / count) + 1
        found.append(min(max(near, found[-1] + 1), len(lengths) - count + share))
    return [*found, len(lengths)]


def _each(threads: int, processes: int) -> int:
    return max(1, threads // processes)


class _Other:
    """Another process and its share; `numbers` is what it hands over, room for a matrix of so many columns."""

    def __init__(self, name: str, share: Share, state: str, columns: int) -> None:
        self._name = name
        memory = os.memfd_create("workbench-gram")
        os.ftruncate(memory, 4 * columns**2)
        self.numbers = numbers_in(memory)
        (hears, told), (answers, says) = os.pipe(), os.pipe()
        self._line = Line(answers, told)
        inherited = (hears, says, memory)
        # It looks for modules where this process does.
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", helper.__name__, state, *map(str, inherited)],
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
                env=os.environ | path,
            )
        finally:
            for file in inherited:
                os.close(file)
        self.say(to_json(share))

    def say(self, message: object) -> None:
        try:
            self._line.say(message)
        except BrokenPipeError:
            raise self._ended() from None

    def hear(self) -> dict[str, Any]:
        """What it answers. Raises what it raised, or why it answers no more."""
        try:
            answer: dict[str, Any] = self._line.hear()
        except EOFError:
            raise self._ended() from None
        if "error" in answer:
            raise UserError(answer["error"]) if answer["user"] else RuntimeError(f"{self._name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Kill it, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._line.close()

    def _ended(self) -> Exception:
        """Why it has ended without having been told to."""
        code = self._process.wait()
        if code >= 0:
            return RuntimeError(f"{self._name} ended with exit code {code}")
        return UserError(
            f"{self._name} was killed by {signal.Signals(-code).name} (often: out of memory): free some memory or ask "
            "for fewer `devices` in `calibration`, and start again; finished layers are kept"
        )
