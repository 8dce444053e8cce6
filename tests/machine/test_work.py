"""A worker's temporary files go with it, its log stays where it failed; its answer is a record, or the job fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_driver import NVML, FakeGpu
from tests.places import ROOT
from workbench.console import Console
from workbench.errors import WorkFailed
from workbench.home import machine_lock
from workbench.machine.work import in_rounds, work
from workbench.records import Bandwidth, Conditions, Measurement, to_json


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it where it compiles.

    def run(name: str) -> Any:
        own = {"PYTHONPATH": str(ROOT)}
        function = f"tests.machine.children:{name}"
        return work(function, None, dict, Console(quiet=True), name, limit_s=60, environment=own)[0]

    return run


def test_what_an_engine_leaves_goes_with_its_worker(call: Any, tmp_path: Path) -> None:
    told = call("whoami")["environment"]
    place = Path(told["TMPDIR"])
    assert place.parent == tmp_path and place.name.startswith("workbench-") and not place.exists()
    assert Path(told["TORCHINDUCTOR_CACHE_DIR"]) == tmp_path / "home" / "compiled", "what it compiled stays"
    assert told["PYTHONUTF8"] == "1", "whatever the terminal's letters are"
    assert list((tmp_path / "home" / "logs").iterdir()) == []


def test_the_log_of_a_failure_stays(call: Any, tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match="KeyError") as caught:
        call("raises")
    found = re.search(r"\(log: (\S+)\)$", str(caught.value))
    assert found and "Traceback" in Path(found[1]).read_text() and ".partial" not in found[1]


def test_who_waits_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = (
        "import sys\n"
        "from workbench.home import machine_lock, who\n"
        "sys.argv = ['/usr/bin/workbench', 'run', 'mine.yaml']\n"
        "with machine_lock(lambda other: None, who('vllm: base')):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    own = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    other = subprocess.Popen(
        [sys.executable, "-c", program], env=own, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin and other.stdout and other.stdout.readline() == "held\n"
    told = list[str]()

    def waiting(who: str) -> None:
        told.append(who)
        assert other.stdin
        other.stdin.close()  # It ends, and so does the wait.

    with machine_lock(waiting, "me"):
        assert (tmp_path / "workbench.lock").read_text() == "me"
    other.wait()
    (who,) = told
    assert re.fullmatch(
        rf": pid {other.pid}, `workbench run mine.yaml` since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d, at vllm: base", who
    )


def test_what_steers_a_terminal_is_not_repeated_of_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = list[str]()
    with machine_lock(told.append, "\x1b[2J"), pytest.raises(TimeoutError), machine_lock(_give_up(told), "me"):
        pass
    assert told == [""]


def _give_up(told: list[str]) -> Callable[[str], None]:
    def waiting(who: str) -> None:
        told.append(who)
        raise TimeoutError

    return waiting


def test_what_a_job_told_last_is_said_after_its_first_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = {"PYTHONPATH": str(ROOT)}
    list(in_rounds("tests.machine.children:tells", None, int, Console(), "job", limit_s=60, environment=own))
    assert capfd.readouterr().err == "job: perplexity 12\n"


@pytest.mark.parametrize(
    ("given", "hertz"),
    [({}, 1.2e9), ({"CUDA_VISIBLE_DEVICES": "GPU-2"}, 1.98e9), ({"CUDA_VISIBLE_DEVICES": "GPU-2,GPU-0"}, 1.2e9)],
)
def test_only_the_job_s_gpus_are_watched_and_in_its_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], hertz: float
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    every = [FakeGpu(uuid=f"GPU-{n}", clock_mhz=clock) for n, clock in enumerate((1200, 300, 1980))]
    monkeypatch.setitem(sys.modules, "pynvml", NVML(every))
    for repeats_s, seen in (([[0.0, 1e9]], hertz), ([[0.0, 1e-9]], None)):
        told = to_json(Measurement("NVIDIA A2", conditions=Conditions(repeats_s=repeats_s)))
        own = {"PYTHONPATH": str(ROOT), **given}
        show, function = Console(quiet=True), "tests.machine.children:echo"
        _, cost = work(function, told, Measurement, show, "job", limit_s=60, environment=own)
        clocks = cost.conditions["gpu_clock_hz"]
        assert (clocks and clocks[0]) == seen
        assert clocks is None or clocks[2] == (1.98e9 if "GPU-2" in given.get("CUDA_VISIBLE_DEVICES", "") else hertz)


def test_a_worker_sees_one_gpu_unless_it_is_given_more(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying was timed, and quantizing done, with every GPU in sight, and maybe on another than the job's."""
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(uuid=f"GPU-{n}") for n in range(3)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    told = call("whoami")["environment"]
    assert (told["CUDA_DEVICE_ORDER"], told["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "GPU-2")


@pytest.mark.parametrize("said", [{"bytes_per_s": "fast"}, {"bytes_per_s": -1}, {}, 7, None])
def test_an_answer_of_another_shape_is_a_failure_and_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(WorkFailed, match=r"^no answer to what was asked: .*\(log: (.*)\)$") as failure:
        work(
            "tests.machine.children:echo",
            said,
            Bandwidth,
            Console(quiet=True),
            "echo",
            limit_s=60,
            environment={"PYTHONPATH": str(ROOT)},
        )
    assert Path(str(failure.value).rpartition("(log: ")[2].rstrip(")")).exists()
