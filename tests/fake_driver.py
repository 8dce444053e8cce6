"""A driver's library as a Python module, for what a real one cannot be made to do on demand: refuse, lie, be absent.

`NVML` has the few functions of `pynvml` that the program asks. Put into `sys.modules["pynvml"]` of a test's process, or
written out as a file that a child process imports (`write`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class NVMLError(Exception):
    """What every refused question raises."""


@dataclass
class FakeGpu:
    """`processes`: pid -> bytes, or None where the driver does not say."""

    uuid: str = "GPU-11111111-0000"
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 << 30
    used: int = 1 << 30
    processes: dict[int, int | None] = field(default_factory=dict)
    joules: float = 0.0
    clock_mhz: int = 1980
    reasons: int = 0
    """NVML's bits for lower clocks."""
    slices: list[FakeGpu] = field(default_factory=list)
    """Into which MIG cuts it."""


NOT_OF_SLICES = (
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetTotalEnergyConsumption",
)


@dataclass
class NVML:
    """`refused`: names of functions that this driver does not support; all of them where it is not there at all."""

    gpus: list[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    refused: Collection[str] = ()
    NVML_CLOCK_SM: int = 1

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def ask(*arguments: Any) -> Any:
            of_a_slice = name in NOT_OF_SLICES and any(arguments[0] is each for gpu in self.gpus for each in gpu.slices)
            if name in self.refused or of_a_slice:
                raise NVMLError("Not Supported")
            return getattr(self, f"_{name}")(*arguments)

        return ask

    def _nvmlInit(self) -> None:
        return None

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.95"

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        found = [each for gpu in self.gpus for each in (gpu, *gpu.slices) if each.uuid == uuid]
        if not found:
            raise NVMLError("Not Found")
        return found[0]

    def _nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:
        return 7 if gpu.slices else 0

    def _nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, place: int) -> FakeGpu:
        if place >= len(gpu.slices):
            raise NVMLError("Not Found")
        return gpu.slices[place]

    def _nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def _nvmlDeviceGetName(self, gpu: FakeGpu) -> bytes:
        return gpu.name.encode()

    def _nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(total=gpu.total, used=gpu.used)

    def _nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.processes.items()]

    def _nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(gpu=90)

    def _nvmlDeviceGetClockInfo(self, gpu: FakeGpu, which: int) -> int:
        return gpu.clock_mhz

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> int:
        return gpu.reasons

    def _nvmlDeviceGetTotalEnergyConsumption(self, gpu: FakeGpu) -> int:
        return int(gpu.joules * 1000)


def write(folder: Path, gpus: int = 1) -> Path:
    """A folder for a child's PYTHONPATH in which `import pynvml` finds a driver with so many GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pynvml.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.fake_driver import NVML, FakeGpu\n"
        f"driver = NVML([FakeGpu(uuid=f'GPU-{{n}}{{n}}') for n in range({gpus})])\n"
        "def __getattr__(name): return getattr(driver, name)\n"
    )
    return folder
