"""What benchmarks of two sides share: a side as a process that answers when asked, and what their rounds say.

A machine drifts within seconds. So the sides take turns many times, a second or two each, and a round gives one ratio:
what both had to bear cancels.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.report import metrics

Side = Callable[[], dict[str, float]]
"""One turn: what was measured in it, by name."""


class Worker:
    """A script's `--worker` in a process of its own: idle until it is asked, then it prints one line of JSON."""

    def __init__(self, script: str, asked: dict[str, Any], environment: dict[str, str]) -> None:
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join((root, str(Path(__file__).resolve().parent)))
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the worker)
        self._child = subprocess.Popen(
            [sys.executable, "-P", script, "--worker", json.dumps(asked)],
            env={**os.environ, "PYTHONPATH": path, **environment}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

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


def verdict(pairs: list[tuple[float, float]], limit: float) -> tuple[str, bool]:
    """A line on ours against theirs, and whether the median ratio of the rounds is within `limit` of 1."""
    ratios = [own / peer for peer, own in pairs]
    ratio, spread = statistics.median(ratios), metrics.interval(ratios)
    peer, own = (statistics.median(side) for side in zip(*pairs, strict=True))
    between = f"95 % {spread[0]:.3f} to {spread[1]:.3f}" if spread else "one round"
    return f"{peer:10.3f} {own:10.3f}   ratio {ratio:.3f} ({between})", abs(ratio - 1) <= limit
