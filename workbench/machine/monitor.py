"""Memory of a process tree, sampled from outside: the same instrument for every backend.

Resident memory is split as the kernel splits it: anonymous (what the engine allocated) and file-backed
(memory-mapped weights and libraries, which the kernel may drop). A single figure would make a memory-mapped
engine look small before its pages are touched, and large because of pages that cost nothing.
Device memory is asked of NVML, process by process; without an NVIDIA driver it stays `None`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FIELDS = {"VmRSS": "rss", "RssAnon": "rss_anon", "RssFile": "rss_file", "RssShmem": "rss_shared"}


class Monitor:
    """Peaks of one process tree; call the instance with the root's pid as often as you like."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._devices = _device_handles()

    def __call__(self, pid: int) -> None:
        pids = _tree(pid)
        total: dict[str, int] = {}
        for member in pids:
            for name, size_bytes in _resident(member).items():
                total[name] = total.get(name, 0) + size_bytes
        if self._devices:
            total["vram"] = _device_bytes(self._devices, set(pids))
        for name, size_bytes in total.items():
            self.peak[name] = max(self.peak.get(name, 0), size_bytes)

    def memory(self) -> dict[str, int]:
        """Bytes, as `peak_rss`, `peak_rss_anon`, `peak_rss_file`, `peak_vram`..."""
        return {f"peak_{name}": size_bytes for name, size_bytes in self.peak.items()}


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


def _device_handles() -> list[Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # No library, no driver, no permission: all mean "not measured".
        return []


def _device_bytes(devices: list[Any], pids: set[int]) -> int:
    import pynvml

    used = 0
    for device in devices:
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
            if process.pid in pids and process.usedGpuMemory:
                used += process.usedGpuMemory
    return used
