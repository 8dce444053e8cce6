"""Memory of a process tree, seen from outside and split as the kernel splits it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.machine import isolate
from workbench.machine.monitor import Monitor

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peaks(folder: Path, payload: dict[str, Any]) -> dict[str, int]:
    monitor = Monitor()
    reply = isolate.call("tests.children:allocates", payload, workdir=folder, on_sample=monitor, time_limit_s=60)
    assert reply.error is None, reply.error
    return monitor.memory()


def test_what_a_worker_allocates_is_seen(tmp_path: Path) -> None:
    small = peaks(tmp_path / "small", {"bytes": 4096})
    large = peaks(tmp_path / "large", {"bytes": 100 * MIB})
    grown = large["peak_rss_anon"] - small["peak_rss_anon"]
    assert 95 * MIB < grown < 120 * MIB
    assert large["peak_rss"] >= large["peak_rss_anon"]
    assert small["peak_rss"] < 60 * MIB, "what the parent holds is not the worker's"


def test_a_grandchild_counts_too(tmp_path: Path) -> None:
    alone = peaks(tmp_path / "alone", {"bytes": 60 * MIB})
    both = peaks(tmp_path / "both", {"bytes": 60 * MIB, "child": True})
    assert 55 * MIB < both["peak_rss_anon"] - alone["peak_rss_anon"] < 90 * MIB


def test_memory_mapped_files_are_told_apart(tmp_path: Path) -> None:
    """llama.cpp maps its weights: the kernel may drop those pages, so they are not what it needs."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 64)
    before, after = Monitor(), Monitor()
    before(os.getpid())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) > 0
        after(os.getpid())
    grown = {name: after.memory()[name] - before.memory()[name] for name in ("peak_rss_file", "peak_rss_anon")}
    assert grown["peak_rss_file"] > 60 * MIB
    assert grown["peak_rss_anon"] < 8 * MIB


def test_peaks_stay_after_the_process_has_gone() -> None:
    monitor = Monitor()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        limit = time.monotonic() + 20
        while monitor.memory().get("peak_rss", 0) < MIB and time.monotonic() < limit:
            monitor(child.pid)
    finally:
        child.kill()
        child.wait()
    seen = monitor.memory()
    monitor(child.pid)
    assert monitor.memory() == seen and seen["peak_rss"] > MIB


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    monitor = Monitor()
    monitor(os.getpid())
    if not Path("/dev/nvidia0").exists():
        assert "peak_vram" not in monitor.memory()
