"""The NVIDIA GPUs of this machine, as the driver's own library (NVML) sees them.

What a driver does not answer (WSL2 and MIG lack much of it) is None: never an error, and never zero. Light enough for
workers: standard library, and `pynvml` where it is installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU; `index` is its place on the PCI bus, as NVML counts."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None


def gpus(environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that CUDA programs may use under these variables; none without a driver, its library or permission."""
    nvml = _library()
    count = _asked(nvml.nvmlDeviceGetCount) if nvml else 0
    found = []
    for index in range(count or 0):
        handle = _asked(nvml.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:
            memory = _asked(nvml.nvmlDeviceGetMemoryInfo, handle)
            uuid, name = (_text(_asked(ask, handle)) for ask in (nvml.nvmlDeviceGetUUID, nvml.nvmlDeviceGetName))
            found.append(Gpu(index, uuid or str(index), name or "NVIDIA GPU", memory and int(memory.total)))
    return visible(found, environment.get("CUDA_VISIBLE_DEVICES"))


def visible(found: Sequence[Gpu], wanted: str | None) -> list[Gpu]:
    """Those of `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs, up to the first that means none, as in CUDA.

    Indices are of the PCI order, which workers are told to count by (`CUDA_DEVICE_ORDER`).
    """
    if wanted is None:
        return list(found)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in wanted.split(",")):
        meant = [gpu for gpu in found if word and (word == str(gpu.index) or gpu.uuid.startswith(word))]
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
        asked = [_asked(self._nvml.nvmlDeviceGetHandleByIndex, gpu.index) for gpu in watched] if self._nvml else []
        self.handles = [handle for handle in asked if handle is not None]
        self._before = [self._used(handle) for handle in self.handles]
        self._recognized = False
        self._most_strangers = 0

    def bytes_of(self, pids: Collection[int]) -> int | None:
        """Bytes that these processes have now; None where it cannot be told, or nothing is taken yet."""
        own: list[int | None] = []
        others = 0
        for handle in self.handles:
            for process in _asked(self._nvml.nvmlDeviceGetComputeRunningProcesses, handle) or []:
                if process.pid in pids:
                    own.append(process.usedGpuMemory)
                else:
                    others += 1
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
        for handle in self.handles:
            used = _asked(self._nvml.nvmlDeviceGetUtilizationRates, handle)
            megahertz = _asked(self._nvml.nvmlDeviceGetClockInfo, handle, self._nvml.NVML_CLOCK_SM)
            if megahertz is not None and used is not None and used.gpu > 50:
                at_work.append(megahertz * 1e6)
            reasons = _asked(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
            if reasons is not None:
                told = (told or 0) | int(reasons)
        return at_work, told

    def strangers(self) -> int | None:
        """The most processes of others at once; None where the job's own were never recognized among them."""
        return self._most_strangers if self._recognized else None

    def _grown(self) -> int | None:
        total = 0
        for handle, before in zip(self.handles, self._before, strict=True):
            now = self._used(handle)
            if now is None or before is None:
                return None
            total += max(0, now - before)
        return total or None

    def _used(self, handle: Any) -> int | None:
        memory = _asked(self._nvml.nvmlDeviceGetMemoryInfo, handle)
        return None if memory is None else int(memory.used)


def for_a_job(count: int = 1) -> dict[str, str]:
    """Variables that give a worker the first `count` of the GPUs that are visible here, and no others; empty without.

    An engine that sees several spreads a model over all of them (llama.cpp) or takes the first (the others), so that
    two engines would not be measured on the same.
    """
    chosen = gpus()[:count]
    named = [gpu.uuid if gpu.uuid.startswith(("GPU-", "MIG-")) else str(gpu.index) for gpu in chosen]
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
    handle = _asked(nvml.nvmlDeviceGetHandleByIndex, gpu.index) if nvml else None
    spent = None if handle is None else _asked(nvml.nvmlDeviceGetTotalEnergyConsumption, handle)
    return None if spent is None else float(spent) / 1e3


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
