"""What is said of GPUs when the driver says little, lies about process ids, or has several of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_driver import NVML, FakeGpu, write
from tests.places import ROOT
from workbench.gpus import Gpu, Watch, driver_version, for_a_job, gpus, installed, joules, too_few, visible

GIB = 1 << 30
EVERY = ("nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> NVML:
    fake = NVML()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_a_gpu_and_its_driver(driver: NVML) -> None:
    assert gpus({}) == [Gpu(0, "GPU-11111111-0000", "NVIDIA H100 80GB HBM3", 80 * GIB)]
    assert driver_version() == "580.95"


@pytest.mark.parametrize("refused", EVERY)
def test_what_is_not_supported_is_none_and_no_error(driver: NVML, refused: str) -> None:
    """As on WSL2, and with MIG."""
    driver.refused = [refused]
    (gpu,) = gpus({})
    assert (gpu.memory_bytes is None) == (refused == "nvmlDeviceGetMemoryInfo")
    watch = Watch([gpu])
    driver.gpus[0].processes = {7: 3 * GIB}
    expected = None if refused == "nvmlDeviceGetComputeRunningProcesses" else 3 * GIB
    assert watch.bytes_of({7}) == expected


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"])
def test_no_driver_is_no_gpu(driver: NVML, refused: str) -> None:
    driver.refused = [refused]
    assert gpus({}) == []


def test_a_process_and_a_stranger(driver: NVML) -> None:
    watch = Watch(gpus({}))
    driver.gpus[0].processes = {7: 3 * GIB, 99: 5 * GIB}
    assert watch.bytes_of({6, 7}) == 3 * GIB and watch.strangers() == 1


def test_in_a_container_whose_process_ids_are_its_own(driver: NVML) -> None:
    """Never 0, and nobody is called a stranger: the only process there is the job's, under another number."""
    watch = Watch(gpus({}))
    assert watch.bytes_of({7}) is None
    driver.gpus[0].processes = {123456: 3 * GIB}
    driver.gpus[0].used += 4 * GIB
    assert watch.bytes_of({7}) == 4 * GIB and watch.strangers() is None


def test_a_process_whose_memory_the_driver_does_not_tell(driver: NVML) -> None:
    watch = Watch(gpus({}))
    driver.gpus[0].processes, driver.gpus[0].used = {7: None}, 3 * GIB
    assert watch.bytes_of({7}) == 2 * GIB


def test_after_its_end_a_job_takes_nothing(driver: NVML) -> None:
    watch = Watch(gpus({}))
    driver.gpus[0].processes = {7: 3 * GIB}
    watch.bytes_of({7})
    driver.gpus[0].processes, driver.gpus[0].used = {99: GIB}, 9 * GIB
    assert watch.bytes_of({7}) is None


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-bb", [1]),
        ("0,9,1", [0]),
        ("GPU-", []),
        ("0,0", [0]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(wanted: str | None, places: list[int]) -> None:
    all_of_them = [Gpu(i, f"GPU-{word}", "x", None) for i, word in enumerate(("aa", "bb", "cc"))]
    assert visible(all_of_them, wanted) == [all_of_them[i] for i in places]


def test_only_the_job_s_gpus_are_watched(driver: NVML) -> None:
    driver.gpus = [FakeGpu(uuid=f"GPU-{n}", processes={7: GIB}, joules=5.0 + n) for n in range(4)]
    chosen = gpus({"CUDA_VISIBLE_DEVICES": "2"})
    assert [gpu.index for gpu in chosen] == [2]
    assert Watch(chosen).bytes_of({7}) == GIB
    assert joules(chosen[0]) == 7.0
    driver.refused = ["nvmlDeviceGetTotalEnergyConsumption"]
    assert joules(chosen[0]) is None


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("wanted", "uuids"),
    [
        ("MIG-b", ["MIG-b"]),
        (None, ["MIG-a"]),
        ("0", ["MIG-a"]),
        ("MIG-c,MIG-a", ["MIG-c"]),
        ("1,MIG-b", ["MIG-b"]),
        ("1", ["GPU-1"]),
        ("MIG-d", []),
    ],
)
def test_a_slice_is_a_gpu(driver: NVML, monkeypatch: pytest.MonkeyPatch, wanted: str | None, uuids: list[str]) -> None:
    """A program was told of no GPU where a slice was named. CUDA gives it one slice, and nothing beside it."""
    sizes = {"a": "1g.10gb", "b": "2g.20gb", "c": "1g.10gb"}
    slices = [FakeGpu(f"MIG-{n}", f"{H100} MIG {size}", int(size[3:5]) * GIB) for n, size in sizes.items()]
    driver.gpus = [FakeGpu(uuid="GPU-0", slices=slices), FakeGpu(uuid="GPU-1")]
    given = {} if wanted is None else {"CUDA_VISIBLE_DEVICES": wanted}
    assert [gpu.uuid for gpu in gpus(given)] == uuids
    assert installed() == [
        Gpu(0, "MIG-a", f"{H100} MIG 1g.10gb", 10 * GIB),
        Gpu(0, "MIG-b", f"{H100} MIG 2g.20gb", 20 * GIB),
        Gpu(0, "MIG-c", f"{H100} MIG 1g.10gb", 10 * GIB),
        Gpu(1, "GPU-1", H100, 80 * GIB),
    ]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert for_a_job(None).get("CUDA_VISIBLE_DEVICES", "") == ",".join(uuids)
    assert (too_few(2) is None) == (len(uuids) > 1)


def test_a_job_gets_one_gpu_unless_it_asks_for_more(driver: NVML, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.gpus = [FakeGpu(uuid=f"GPU-{n}") for n in range(4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert for_a_job() == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "GPU-3"}
    assert for_a_job(2)["CUDA_VISIBLE_DEVICES"] == for_a_job(None)["CUDA_VISIBLE_DEVICES"] == "GPU-3,GPU-1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert for_a_job() == {}


@pytest.mark.slow
def test_engines_built_for_processors_are_not_believed_to_use_a_gpu(tmp_path: Path) -> None:
    """`make demo` on a machine with NVIDIA's driver: torch was asked for CUDA, and knew none."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("the torch here is built for CUDA")
    code = (
        "from workbench.machine.identity import has_cuda\nfrom workbench.engines import idle_gpu, uses_gpu\n"
        "print(has_cuda(), *map(uses_gpu, ('transformers', 'llamacpp', 'vllm')))\nprint(idle_gpu('transformers'))"
    )
    environment = {**os.environ, "WORKBENCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    environment["PYTHONPATH"] = f"{write(tmp_path / 'driver')}:{ROOT}"
    for hidden, words in ((None, "True False False False"), ("", "False False False False")):
        more = {} if hidden is None else {"CUDA_VISIBLE_DEVICES": hidden}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | more, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()
        assert told[0] == words
        assert ("`make gpu` sets up what is" in told[1]) == (hidden is None)
