"""The NVIDIA GPUs of this machine, as the driver's own library (NVML) sees them.

What a driver does not answer (WSL2 and MIG lack much of it) is None: never an error, and never zero. A slice of a GPU
(MIG) is a GPU like others here. Light enough for workers: standard library, and `pynvml` where it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLICE = "MIG-"
"""How the UUIDs of slices begin."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or a slice of one; `index` is its place on the PCI bus, as NVML counts."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None


def gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA programs may use under these variables; none without a driver, its library or permission."""
    return visible(installed(), environment.get("CUDA_VISIBLE_DEVICES"))


def installed() -> list[Gpu]:
    """All GPUs of this machine; of one that is cut, its slices, as no program can use the whole."""
    nvml = _library()
    count = _asked(nvml.nvmlDeviceGetCount) if nvml else 0
    found = []
    for index in range(count or 0):
        handle = _asked(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:
            slices = range(_asked(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0)
            cut = [_asked(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, place) for place in slices]
            found += [_gpu(nvml, index, each) for each in cut if each is not None] or [_gpu(nvml, index, handle)]
    return found


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    """NVML names a slice by its GPU and its profile: `NVIDIA H100 80GB HBM3 MIG 1g.10gb`."""
    memory = _asked(nvml.nvmlDeviceGetMemoryInfo, handle)
    uuid, name = (_text(_asked(ask, handle)) for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName))
    return Gpu(index, uuid or str(index), name or "NVIDIA GPU", memory and int(memory.total))


def visible(found: Sequence[Gpu], wanted: str | None) -> list[Gpu]:
    """Those of `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs, up to the first that means none, as in CUDA.

    Indices are of the PCI order, which workers are told to count by (`CUDA_DEVICE_ORDER`). Of slices CUDA gives a
    program the first alone, and then no whole GPU either (NVIDIA's MIG User Guide, "CUDA Device Enumeration").
    """
    chosen = list(found) if wanted is None else _named(found, wanted)
    return [gpu for gpu in chosen if gpu.uuid.startswith(SLICE)][:1] or chosen


def _named(found: Sequence[Gpu], wanted: str) -> list[Gpu]:
    chosen: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        meant = [gpu for gpu in found if word == str(gpu.index)][:1]
        meant = meant or [gpu for gpu in found if word and gpu.uuid.startswith(word)]
        if len(meant) != 1 or meant[0] in chosen:
            break
        chosen += meant
    return chosen


def driver_version() -> str | None:
    """The driver's version; None where there is none."""
    nvml = _library()
    return _text(_asked(nvml.nvmlSystemGetDriverVersion)) if nvml else None


class Watch:
    """What a job takes of its GPUs' memory, and who else is there, sampled from outside.

    NVML names processes as the host does. In a container without the host's process ids none of a job's is found;
    then what the GPUs' used memory grew by since the watch began stands for it, and nobody is called a stranger.
    """

    def __init__(self, watched: Sequence[Gpu]) -> None:
        self._nvml: Any = _library() if watched else None
        asked = [(gpu, _handle(self._nvml, gpu)) for gpu in watched] if self._nvml else []
        self._watched = [(gpu, handle) for gpu, handle in asked if handle is not None]
        self._told: dict[tuple[Gpu, str], bool] = {}
        """Whether what was asked of a GPU was ever answered."""
        self._before = [self._used(gpu, handle) for gpu, handle in self._watched]
        self._recognized = False
        self._most_strangers = 0

    def bytes_of(self, pids: Collection[int]) -> int | None:
        """Bytes that these processes have now; None where it cannot be told, or nothing is taken yet."""
        own: list[int | None] = []
        others = 0
        for gpu, handle in self._watched:
            found = _asked(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle)
            here = [process.usedGpuMemory for process in found or [] if process.pid in pids]
            if found is None or here:
                self._note(gpu, "memory by process", found is not None and None not in here)
            own += here
            others += len(found or []) - len(here)
        if own:
            self._recognized = True
            self._most_strangers = max(self._most_strangers, others)
            told = [size_bytes for size_bytes in own if size_bytes is not None]
            if len(told) == len(own):
                return sum(told) or None
        elif self._recognized:
            return None
        return self._grown()

    def clocks(self) -> tuple[list[float], int | None]:
        """Hertz of each GPU that is at work, and NVML's reasons for lower clocks, over all; None if none tells them."""
        at_work, told = [], None
        for gpu, handle in self._watched:
            used = _asked(self._nvml.nvmlDeviceGetUtilizationRates, handle)
            megahertz = _asked(self._nvml.nvmlDeviceGetClockInfo, handle, self._nvml.NVML_CLOCK_SM)
            self._note(gpu, "clocks", None not in (used, megahertz))
            if megahertz is not None and used is not None and used.gpu > 50:
                at_work.append(megahertz * 1e6)
            reasons = _asked(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
            self._note(gpu, "reasons for lower clocks", reasons is not None)
            if reasons is not None:
                told = (told or 0) | int(reasons)
        return at_work, told

    def strangers(self) -> int | None:
        """The most processes of others at once; None where the job's own were never recognized among them."""
        return self._most_strangers if self._recognized else None

    def untold(self) -> list[str]:
        """What the driver never told though it was asked, in words, a line a GPU.

        Energy is asked for too: all GPUs that `make gpu` is for (Turing or newer) count it, so that its lack is rare.
        """
        lines = []
        for gpu, _ in self._watched:
            self._note(gpu, "energy", joules(gpu) is not None)
            lacking = [what for (each, what), told in self._told.items() if each == gpu and not told]
            if lacking:
                lines.append(f"{', '.join(lacking)} of GPU {gpu.index} ({gpu.name})")
        return lines

    def _note(self, gpu: Gpu, what: str, told: bool) -> None:
        self._told[gpu, what] = self._told.get((gpu, what), False) or told

    def _grown(self) -> int | None:
        total = 0
        for (gpu, handle), before in zip(self._watched, self._before, strict=True):
            now = self._used(gpu, handle)
            if now is None or before is None:
                return None
            total += max(0, now - before)
        return total or None

    def _used(self, gpu: Gpu, handle: Any) -> int | None:
        memory = _asked(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        self._note(gpu, "used memory", memory is not None)
        return None if memory is None else int(memory.used)


def for_a_job(count: int | None = 1) -> dict[str, str]:
    """Variables that give a worker the first `count` of the GPUs that are visible here (None: all of them), and no
    others; empty without.

    An engine that sees several spreads a model over all of them (llama.cpp) or takes the first (the others), so that
    two engines would not be measured on the same.
    """
    chosen = gpus()[:count]
    named = [gpu.uuid if gpu.uuid.startswith(("GPU-", SLICE)) else str(gpu.index) for gpu in chosen]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(named)} if chosen else {}


def too_few(count: int) -> str | None:
    """Why a job cannot have `count` GPUs here; None if it can."""
    here = len(gpus())
    if count <= here:
        return None
    return f"it is to have {count} GPUs, and {here} {'is' if here == 1 else 'are'} visible here"


def joules(gpu: Gpu) -> float | None:
    """Joules since the driver was loaded; None for a GPU without the counter (before Volta)."""
    nvml = _library()
    handle = _handle(nvml, gpu) if nvml else None
    spent = None if handle is None else _asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return None if spent is None else float(spent) / 1e3


def _handle(nvml: Any, gpu: Gpu) -> Any:
    if gpu.uuid.startswith(SLICE):
        return _asked(nvml.nvmlDeviceGetHandleByUUID, gpu.uuid)
    return _asked(nvml.nvmlDeviceGetHandleByIndex, gpu.index)


def _library() -> Any:
    """`pynvml`, initialized; None where it is not installed, or there is no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, no permission: all mean "no GPU to speak of"
        return None
    return pynvml


def _asked(question: Callable[..., Any], *arguments: object) -> Any:
    """NVML's answer, or None for what this driver or GPU does not support."""
    try:
        return question(*arguments)
    except Exception:  # NVMLError has a subclass a reason, made when the library is loaded
        return None


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
