"""Memory of a process tree, seen from outside and split as the kernel splits it."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_driver import NVML, FakeGpu
from tests.places import ROOT
from workbench.machine import isolate
from workbench.machine import monitor as module
from workbench.machine.monitor import Monitor

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peaks(folder: Path, payload: dict[str, Any]) -> dict[str, int]:
    monitor = Monitor()
    reply = isolate.call(
        "tests.machine.children:allocates",
        payload,
        workdir=folder,
        on_sample=monitor,
        time_limit_s=60,
        environment={"PYTHONPATH": str(ROOT)},
    )
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


def a_machine(
    root: Path, *, busy: int, own: int, stolen: int = 0, clock_khz: int | None = None, hot: int | None = None
) -> None:
    """The files of /proc and /sys that are read, in ticks of a hundredth of a second."""
    (root / f"proc/{os.getpid()}").mkdir(parents=True, exist_ok=True)
    stat = f"cpu  {busy} 0 0 {10_000 - busy} 0 0 0 {stolen} 0 0\ncpu0 1 2 3\nbtime 1\n"
    (root / "proc/stat").write_text(stat)
    fields = ["S", *["0"] * 10, str(own), *["0"] * 30]
    (root / f"proc/{os.getpid()}/stat").write_text(f"1 (a (b) c) {' '.join(fields)}\n")
    core = root / "sys/devices/system/cpu/cpu0"
    (core / "cpufreq").mkdir(parents=True, exist_ok=True)
    (core / "thermal_throttle").mkdir(parents=True, exist_ok=True)
    if clock_khz is not None:
        (core / "cpufreq/scaling_cur_freq").write_text(f"{clock_khz}\n")
    if hot is not None:
        (core / "thermal_throttle/core_throttle_count").write_text(f"{hot}\n")


def seen(root: Path, *states: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The conditions of a job during which the machine was in these states, a second apart."""
    clock = iter(range(100, 200))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(module, "_tree", lambda pid: [])
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
    monitor = Monitor(root)
    for state in states:
        if state.get("waited"):
            monitor.resume()
        a_machine(root, **{name: value for name, value in state.items() if name != "waited"})
        monitor(os.getpid())
    return monitor.conditions()


def test_a_quiet_machine_warns_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(
        tmp_path,
        *({"busy": 100 * i, "own": 98 * i, "clock_khz": 3_000_000 + i, "hot": 4} for i in range(4)),
        monkeypatch=monkeypatch,
    )
    assert found["others_cores"] == pytest.approx(0.02) and found["stolen_fraction"] == 0
    assert found["throttled"] is False and found["clock_hz"] == [3.000001e9, 3.000002e9, 3.000003e9]
    assert module.warnings(found) == []


def test_what_others_do_while_a_job_waits_is_not_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [{"busy": 100 * i, "own": 100 * i, "hot": 0} for i in range(3)]
    states += [{"busy": 5000 + 100 * i, "own": 200 + 100 * i, "hot": 3, "waited": i == 0} for i in range(3)]
    found = seen(tmp_path, *states, monkeypatch=monkeypatch)
    assert found["others_cores"] == 0 and found["throttled"] is False
    states[-1] = states[-1] | {"busy": states[-1]["busy"] + 400}
    found = seen(tmp_path, *states, monkeypatch=monkeypatch)
    assert found["others_cores"] == pytest.approx(1.0), "four seconds of others in four of work"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"busy": 200}, "other processes took 1.1 cores on average"),
        ({"stolen": 30}, "hypervisor gave"),
        ({"clock_khz": -900_000}, "clock changed during the run: 1.20 to 2.10 GHz"),
        ({"hot": 1}, "the processor throttled during the run"),
    ],
)
def test_a_machine_that_is_not_quiet_warns(
    change: dict[str, int], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []
    for i in range(4):
        state = {"busy": 100 * i, "own": 95 * i, "stolen": 0, "clock_khz": 3_000_000, "hot": 0}
        state |= {name: state[name] + by * i if name != "busy" else by * i for name, by in change.items()}
        if "clock_khz" in change:
            state["clock_khz"] = [3_000_000, 2_100_000, 1_200_000, 1_200_000][i]
        states.append(state)
    found = module.warnings(seen(tmp_path, *states, monkeypatch=monkeypatch))
    assert len(found) == 1 and words in found[0]


def test_clocks_that_cannot_be_read_are_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine has no such files; and one without /proc at all is no reason to fail either."""
    found = seen(tmp_path, *({"busy": 100 * i, "own": 100 * i} for i in range(3)), monkeypatch=monkeypatch)
    assert found["clock_hz"] is None and found["throttled"] is None and found["gpu_clock_hz"] is None
    assert module.warnings(found) == []
    bare = Monitor(tmp_path / "nothing")
    bare(os.getpid())
    assert set(bare.conditions().values()) == {None}
    assert module.warnings(bare.conditions()) == []


def test_a_probe_that_changes_and_a_gpu_in_use_are_told() -> None:
    assert module.warnings({"probe_s": [0.010, 0.0104, 0.0101]}) == []
    assert "took 10.0 to 12.0 ms" in module.warnings({"probe_s": [0.010, 0.012, 0.011]})[0]
    assert "2 processes not of this job" in module.warnings({"gpu_strangers": 2})[0]


def test_a_strange_process_on_the_gpu_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a library that stands for NVML: there is no GPU where most tests run, and none that others use."""
    processes: dict[int, int | None] = {os.getpid(): 3 * MIB, 1: 9 * MIB}
    fake = NVML([FakeGpu(processes=processes, clock_mhz=1500, reasons=0x40)])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = Monitor(tmp_path)
    monitor(os.getpid())
    assert monitor.memory()["peak_vram"] == 3 * MIB
    found = monitor.conditions()
    assert found["gpu_strangers"] == 1 and found["gpu_throttled"] and found["gpu_clock_hz"] == [1.5e9] * 3
    assert len(module.warnings(found)) == 2


@pytest.mark.parametrize(
    ("timed", "clocks"),
    [
        # A GPU boosts while weights are copied, and runs at its power's limit while prompts are scored.
        ([[102.5, 105.5]], [1.7e9, 1.7e9, 1.71e9]),
        ([[100.5, 102.5], [105.5, 107.5]], [1.3e9, 1.98e9, 1.98e9]),
        ([[120.0, 130.0]], None),
        (None, [1.3e9, 1.7e9, 1.98e9]),
    ],
)
def test_clocks_count_inside_timed_repeats_alone(
    timed: list[list[float]] | None, clocks: list[float] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = NVML([FakeGpu(processes={os.getpid(): MIB})])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    seconds = iter(range(101, 108))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(seconds)))
    monitor = Monitor(tmp_path)
    for fake.gpus[0].clock_mhz in (1980, 1980, 1700, 1700, 1710, 1300, 1300):
        monitor(os.getpid())
    found = monitor.conditions(timed)
    assert found["gpu_clock_hz"] == clocks
    changed = [line for line in module.warnings(found) if "the GPU's clock changed" in line]
    assert len(changed) == (clocks is not None and clocks[0] < 1.5e9)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (["nvmlDeviceGetComputeRunningProcesses"], "memory by process"),
        (["nvmlDeviceGetMemoryInfo"], "used memory"),
        (["nvmlDeviceGetUtilizationRates"], "clocks"),
        (["nvmlDeviceGetClockInfo", "nvmlDeviceGetCurrentClocksThrottleReasons"], "clocks, reasons for lower clocks"),
        (["nvmlDeviceGetTotalEnergyConsumption"], "energy"),
    ],
)
def test_a_driver_that_does_not_tell_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: list[str], words: str
) -> None:
    """As on WSL2 and with MIG: null, and not 0; and a line that says what, of which GPU."""
    gpus = [FakeGpu(used=5 * MIB), FakeGpu(uuid="GPU-2", name="NVIDIA A2")]
    monkeypatch.setitem(sys.modules, "pynvml", NVML(gpus, refused=refused))
    monitor = Monitor(tmp_path, watched=module.gpus({"CUDA_VISIBLE_DEVICES": "1"}))
    monitor(os.getpid())
    found = monitor.conditions()
    assert "peak_vram" not in monitor.memory() and found["gpu_strangers"] is None
    assert found["gpu_clock_hz"] is None or "clocks" not in words
    line = f"NVML does not tell {words} of GPU 1 (NVIDIA A2): what needs it is empty, or estimated"
    assert module.warnings(found) == [line]


def test_a_process_whose_memory_is_not_told_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = NVML([FakeGpu(processes={os.getpid(): None})])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = Monitor(tmp_path)
    fake.gpus[0].used += 3 * MIB
    monitor(os.getpid())
    assert monitor.memory()["peak_vram"] == 3 * MIB, "estimated"
    assert "NVML does not tell memory by process of GPU 0" in module.warnings(monitor.conditions())[0]


def test_what_is_told_after_all_is_not_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = NVML([FakeGpu(processes={os.getpid(): MIB})], refused=["nvmlDeviceGetComputeRunningProcesses"])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = Monitor(tmp_path)
    monitor(os.getpid())
    fake.refused = []
    monitor(os.getpid())
    assert module.warnings(monitor.conditions()) == []


def test_a_slice_is_metered_where_the_driver_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = FakeGpu(uuid="MIG-b", name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", processes={os.getpid(): 3 * MIB})
    whole = FakeGpu(slices=[FakeGpu(uuid="MIG-a"), piece], processes={1: MIB})
    monkeypatch.setitem(sys.modules, "pynvml", NVML([whole]))
    monitor = Monitor(tmp_path, watched=module.gpus({"CUDA_VISIBLE_DEVICES": "MIG-b"}))
    monitor(os.getpid())
    found = monitor.conditions()
    assert monitor.memory()["peak_vram"] == 3 * MIB and found["gpu_strangers"] == 0 and found["gpu_clock_hz"] is None
    (line,) = module.warnings(found)
    lacking = "clocks, reasons for lower clocks, energy of GPU 0 (NVIDIA H100 80GB HBM3 MIG 1g.10gb)"
    assert line.startswith(f"NVML does not tell {lacking}:")


def test_in_a_container_the_growth_of_used_memory_stands_for_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process has another number outside: nothing was measured, and the job itself was called a stranger."""
    fake = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = Monitor(tmp_path)
    fake.gpus[0].processes, fake.gpus[0].used = {4711: 7 * MIB}, fake.gpus[0].used + 8 * MIB
    monitor(os.getpid())
    assert monitor.memory()["peak_vram"] == 8 * MIB
    assert monitor.conditions()["gpu_strangers"] is None
