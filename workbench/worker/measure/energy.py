"""Joules, where the machine counts them: NVML's counter of each GPU, RAPL's of each processor package.

Both are counters since the machine started, so a difference needs no sampling. RAPL is readable by root alone on
most systems since 2020 (CVE-2020-8694), and absent in virtual machines; GPUs before Volta have no counter. What
cannot be read is None, never zero. Processors are counted whole, as nothing tells processes apart, and of the GPUs
those that this process may use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from workbench.gpus import Gpu, gpus, joules

POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Call it before and after: joules in between, or None."""

    def __init__(self, powercap: Path = POWERCAP, count_gpus: bool = True) -> None:
        self._counters: list[tuple[Callable[[], float], float]] = []
        """(joules now, joules at which it starts again from zero)"""
        self.counted: list[str] = []
        """What has a counter here: `processor package-0`, a GPU's name."""
        for zone in sorted(powercap.glob("intel-rapl:*")):
            # A sub-zone (cores, memory) is part of its package.
            if zone.name.count(":") != 1:
                continue
            file = zone / "energy_uj"
            with contextlib.suppress(OSError, ValueError):
                int(file.read_text())
                span = int((zone / "max_energy_range_uj").read_text()) / 1e6
                name = (zone / "name").read_text().strip()
                self._counters.append((lambda file=file: int(file.read_text()) / 1e6, span))  # type: ignore[misc]
                self.counted.append(f"processor {name}")
        for gpu in gpus() if count_gpus else ():
            if joules(gpu) is not None:
                self._counters.append((partial(_joules_now, gpu), 0.0))
                self.counted.append(gpu.name)

    def read(self) -> list[float] | None:
        """All counters now, in joules."""
        try:
            return [read() for read, _ in self._counters] or None
        except Exception:  # a driver that went away is no reason to lose a measurement
            return None

    def since(self, before: list[float] | None) -> float | None:
        """Joules since `before` was read, over all counters."""
        after = self.read()
        if before is None or after is None:
            return None
        total = 0.0
        for old, new, (_, span) in zip(before, after, self._counters, strict=True):
            total += new - old if new >= old else new + span - old
        return total


def _joules_now(gpu: Gpu) -> float:
    spent = joules(gpu)
    if spent is None:
        raise OSError(f"{gpu.name} no longer tells its energy")
    return spent
