"""What a job's processes take and what the machine does meanwhile, sampled from outside: one instrument for all.

Resident memory is split as the kernel splits it: anonymous (what the engine allocated) and file-backed
(memory-mapped weights and libraries, which the kernel may drop). A single figure would make a memory-mapped
engine look small before its pages are touched, and large because of pages that cost nothing.
Device memory is asked of NVML, process by process; without an NVIDIA driver it stays `None`.

By hand, though psutil is here: the split (psutil knows resident and shared memory only), the processes of a tree (to
find them psutil reads those of the whole machine, 1 ms a sample instead of 0.04), and clocks (where the kernel tells
none, psutil takes the nominal one of /proc/cpuinfo for it).

Once a second it also looks at what would make a speed untrue: the load of other processes, time that a hypervisor
gave to others, clocks while repeats were timed, throttling, another's processes on the GPU. What cannot be read is
None; a row measured on a GPU is warned of what its driver did not tell.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from workbench.gpus import Gpu, Watch, gpus
from workbench.records import Conditions

FIELDS = {"VmRSS": "rss", "RssAnon": "rss_anon", "RssFile": "rss_file", "RssShmem": "rss_shared"}
CONDITIONS_S = 1.0
"""Seconds between two looks at clocks and load; they cost more than one at memory."""
BUSY_CORES = 0.25
"""Others' work, in cores on average, from which a row is warned of it."""
STOLEN = 0.02
"""Part of the processors' time that a hypervisor gave to others, likewise."""
CLOCK_SPREAD = 0.1
"""How far clocks in timed repeats may be apart, as a fraction of the highest; likewise of the probe's times."""
THERMAL = 0x20 | 0x40
POWER_BRAKE = 0x80
"""Bits of NVML's reasons for lower clocks (nvmlClocksThrottleReason: SW and HW thermal slowdown, HW power brake)."""


class Monitor:
    """Peaks of one process tree; call the instance with the root's pid as often as you like."""

    def __init__(self, root: Path = Path("/"), watched: Sequence[Gpu] | None = None) -> None:
        """`watched`: the job's GPUs; by default all that this program may see."""
        self.peak: dict[str, int] = {}
        self._gpus = Watch(gpus() if watched is None else watched)
        self._root = root
        self._looked_s = 0.0
        self._first: dict[str, float] | None = None
        self._last: dict[str, float] = {}
        self._spent: dict[str, float] = {}
        self._clocks: list[tuple[float, float]] = []
        """(moment, hertz)"""
        self._gpu_clocks: list[tuple[float, float]] = []
        self._gpu_reasons: int | None = None

    def __call__(self, pid: int) -> None:
        pids = _tree(pid)
        total: dict[str, int] = {}
        for member in pids:
            for name, size_bytes in _resident(member).items():
                total[name] = total.get(name, 0) + size_bytes
        vram = self._gpus.bytes_of(set(pids))
        if vram is not None:
            total["vram"] = vram
        for name, size_bytes in total.items():
            self.peak[name] = max(self.peak.get(name, 0), size_bytes)
        moment = time.monotonic()
        if moment - self._looked_s >= CONDITIONS_S:
            self._looked_s = moment
            self._look(pids, moment)

    def resume(self) -> None:
        """The job goes on after a wait, in which whatever the machine did is not its concern."""
        self._spent = self._change()
        self._first, self._last, self._looked_s = None, {}, 0.0

    def _change(self) -> dict[str, float]:
        """How far each count went while the job was at work."""
        first, last = self._first or {}, self._last
        names = self._spent.keys() | (first.keys() & last.keys())
        return {name: self._spent.get(name, 0.0) + last.get(name, 0.0) - first.get(name, 0.0) for name in names}

    def memory(self) -> dict[str, int]:
        """Bytes, as `peak_rss`, `peak_rss_anon`, `peak_rss_file`, `peak_vram`..."""
        return {f"peak_{name}": size_bytes for name, size_bytes in self.peak.items()}

    def conditions(self, repeats_s: Sequence[Sequence[float]] | None = None) -> Conditions:
        """What the machine did; None where it cannot be read or nothing was seen.

        Of clocks only what was seen inside `repeats_s` (beginnings and ends by the machine's clock), if that is given:
        how far a clock boosts while a model is loaded or scored is no property of what was timed.
        """
        change = self._change()
        found = Conditions(
            others_cores=None,
            stolen_fraction=None,
            clock_hz=_spread(_during(self._clocks, repeats_s)),
            throttled=None,
            gpu_clock_hz=None,
            gpu_throttled=None,
            gpu_strangers=None,
        )
        span = change.get("moment", 0.0)
        if span > 0:
            if "busy" in change:
                others = (change["busy"] - change["own"]) / span
                found["others_cores"] = round(max(0.0, others), 3)
                found["stolen_fraction"] = round(change["stolen"] / max(change["all"], 1e-9), 4)
            if "throttles" in change:
                found["throttled"] = change["throttles"] > 0
        found["gpu_clock_hz"] = _spread(_during(self._gpu_clocks, repeats_s))
        if self._gpu_reasons is not None:
            found["gpu_throttled"] = bool(self._gpu_reasons & (THERMAL | POWER_BRAKE))
        found["gpu_strangers"] = self._gpus.strangers()
        if untold := self._gpus.untold():
            found["gpu_untold"] = untold
        return found

    def _look(self, pids: list[int], moment: float) -> None:
        now = {"moment": moment, **_processor_seconds()}
        throttles = _of_cores(self._root, "thermal_throttle/*_throttle_count")
        if throttles:
            now["throttles"] = sum(throttles)
        if "busy" in now:
            now["own"] = sum(_own_seconds(pid) for pid in (*pids, os.getpid()))
        before = self._last
        self._last = now
        if self._first is None:
            self._first = now
        elif "own" in now and "own" in before and now["own"] - before["own"] > 0.5 * (moment - before["moment"]):
            # An idle core's clock says nothing; most virtual machines tell none.
            clock_khz = max(_of_cores(self._root, "cpufreq/scaling_cur_freq"), default=0)
            self._clocks += [(moment, clock_khz * 1e3)] if clock_khz else []
        clocks, reasons = self._gpus.clocks()
        self._gpu_clocks += [(moment, clock) for clock in clocks]
        if reasons is not None:
            self._gpu_reasons = (self._gpu_reasons or 0) | reasons


def warnings(conditions: Conditions) -> list[str]:
    """What in a job's conditions (`Monitor.conditions`, and the worker's `probe_s`) makes its speeds doubtful."""
    found = []
    others, stolen = conditions.get("others_cores"), conditions.get("stolen_fraction")
    if others is not None and others > BUSY_CORES:
        found.append(f"the machine was busy: other processes took {others:.1f} cores on average")
    if stolen is not None and stolen > STOLEN:
        found.append(f"the machine was shared: its hypervisor gave {stolen:.0%} of the time to others")
    throttled = (conditions.get("throttled"), "the processor"), (conditions.get("gpu_throttled"), "the GPU")
    for yes, what in throttled:
        if yes:
            found.append(f"{what} throttled during the run")
    clocks = (conditions.get("clock_hz"), "the processor's clock"), (conditions.get("gpu_clock_hz"), "the GPU's clock")
    for clock, what in clocks:
        if clock and clock[2] and 1 - clock[0] / clock[2] > CLOCK_SPREAD:
            found.append(f"{what} changed during the run: {clock[0] / 1e9:.2f} to {clock[2] / 1e9:.2f} GHz")
    probes = [seconds for seconds in conditions.get("probe_s") or () if seconds > 0]
    if len(probes) > 1 and max(probes) / min(probes) > 1 + CLOCK_SPREAD:
        found.append(
            f"the processor's speed changed during the run: a fixed piece of work took {min(probes) * 1e3:.1f} to "
            f"{max(probes) * 1e3:.1f} ms"
        )
    if conditions.get("gpu_untold"):
        found.append(f"NVML does not tell {'; '.join(conditions['gpu_untold'])}: what needs it is empty, or estimated")
    if conditions.get("gpu_strangers"):
        found.append(f"the GPU was in use by others: {conditions['gpu_strangers']} processes not of this job")
    return found


def _during(samples: Sequence[tuple[float, float]], spans_s: Sequence[Sequence[float]] | None) -> list[float]:
    if spans_s is None:
        return [value for _, value in samples]
    return [value for moment, value in samples if any(began <= moment <= ended for began, ended in spans_s)]


def _spread(samples: Sequence[float]) -> list[float] | None:
    if not samples:
        return None
    ordered = sorted(samples)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _processor_seconds() -> dict[str, float]:
    """Seconds of all processors since the start: `busy`, `stolen`, `all`; nothing where it cannot be read."""
    try:
        spent = psutil.cpu_times()
        busy = spent.user + spent.nice + spent.system + spent.irq + spent.softirq
        return {"busy": busy, "stolen": spent.steal, "all": busy + spent.idle + spent.iowait + spent.steal}
    except (OSError, AttributeError):  # No /proc; a system that counts less than Linux.
        return {}


def _own_seconds(pid: int) -> float:
    """Processor time of a process and of its children that ended."""
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(spent.user + spent.system + spent.children_user + spent.children_system)


def _of_cores(root: Path, pattern: str) -> list[int]:
    """The numbers in the kernel's files about each core; those that cannot be read are left out."""
    found = []
    for file in (root / "sys/devices/system/cpu").glob(f"cpu[0-9]*/{pattern}"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(file.read_text()))
    return found


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        try:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                waiting.extend(int(word) for word in (thread / "children").read_text().split())
        except OSError:
            continue  # It ended between two reads.
    return found


def _resident(pid: int) -> dict[str, int]:
    sizes = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in FIELDS:
                sizes[FIELDS[name]] = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return sizes
