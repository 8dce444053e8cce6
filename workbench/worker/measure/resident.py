"""A process's own resident memory, and how much of some files the kernel holds already. Linux; None elsewhere.

The parent samples a job's memory from outside ten times a second (`machine/monitor.py`), which tells no phase
from another. In here a phase's exact peak is known: the kernel keeps the highest value and can be asked to begin
anew. Standard library only, because it runs in every engine's own interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

from workbench.worker.base.gguf_file import parts_of

PAGE_BYTES = mmap.PAGESIZE


def resident_bytes() -> int | None:
    """What this process holds in memory now, file-backed pages included."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most it held since it began, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> bool:
    """Begin the peak anew; False where the kernel cannot (then `peak_bytes` is of the whole life)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


class Peak:
    """The most that this process holds from when this was made: the room of one phase of its work."""

    def __init__(self) -> None:
        self._before, self._exact = resident_bytes(), forget_peak()

    def most(self) -> int | None:
        """Bytes at the peak, what was there before included."""
        return peak_bytes() if self._exact else None

    def grown(self) -> int | None:
        """Bytes at the peak beyond what was there before."""
        most = self.most()
        return None if most is None or self._before is None else max(0, most - self._before)


def cached_fraction(path: str) -> float | None:
    """How much of a file, or of a folder's weight files, is in the page cache: 0 is a load from disk.

    By mincore(2) on a mapping of each file, which reads none of it.
    """
    place = Path(path)
    files = parts_of(place) if place.is_file() else [*place.glob("*.safetensors"), *place.glob("*.gguf")]
    pages = held = 0
    for file in files:
        found = _cached_pages(file)
        if found is None:
            return None
        held, pages = held + found[0], pages + found[1]
    return round(held / pages, 4) if pages else None


def _cached_pages(file: Path) -> tuple[int, int] | None:
    """(pages in the cache, pages) of a file."""
    try:
        size_bytes = file.stat().st_size
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        if not size_bytes:
            return 0, 0
        address = libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            return None
        try:
            pages = -(-size_bytes // PAGE_BYTES)
            answer = ctypes.create_string_buffer(pages)
            if libc.mincore(address, size_bytes, answer) != 0:
                return None
            return sum(byte & 1 for byte in answer.raw), pages
        finally:
            libc.munmap(address, size_bytes)
    except (AttributeError, OSError):
        return None
    finally:
        os.close(descriptor)


def _status(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
