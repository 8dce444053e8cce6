"""What of a machine is written into a row: what its GPU's driver did not tell, how fast the job's own GPU copies; in
how many rounds a job is timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_driver import NVML, FakeGpu
from tests.rows import a_row
from workbench.console import Console
from workbench.errors import WorkFailed
from workbench.gpus import for_a_job
from workbench.profile import measure
from workbench.profile.jobs import planned_row
from workbench.quantize.make import Made
from workbench.recipe.load import parse
from workbench.records import Artifact, Bandwidth, Conditions, Cost, Job, Measurement, PreparedBase


@pytest.mark.parametrize(("device", "warned"), [("NVIDIA A2", True), ("cuda", True), ("cpu", False)])
def test_what_a_driver_does_not_tell_is_a_warning_of_rows_on_its_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, warned: bool
) -> None:
    recipe = parse({"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}], "backends": {"transformers": {}}}, Path("r"))
    base = {"base": [Artifact("base", "base", "safetensors", *"pd", 1, 1)]}
    made = Made(PreparedBase("p", "digest", "float32", 10, 40), base, {})

    def in_rounds(*_: object, **__: object) -> Iterator[None]:
        yield from ()
        return Measurement(device), Cost(1.0, conditions=Conditions(gpu_untold=["energy of GPU 0 (NVIDIA A2)"]))

    monkeypatch.setattr(measure, "in_rounds", in_rounds)
    monkeypatch.setattr(measure, "check", lambda *_: None)
    monkeypatch.setattr(measure, "_copy_bandwidth", lambda show: None)
    row = planned_row(recipe, made, recipe.backends[0], "base", None)
    job = measure.run_job(recipe, made, row, None, "transformers", Console(quiet=True))
    with pytest.raises(StopIteration) as ended:
        next(job)
    row = ended.value.value
    assert row.error is None
    line = "NVML does not tell energy of GPU 0 (NVIDIA A2): what needs it is empty, or estimated"
    assert row.warnings == ([line] if warned else [])
    assert ("gpu_untold" in row.measurement.conditions) == warned


def test_the_bandwidth_is_of_the_job_s_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with several one of them was timed, and stood for all."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(uuid=f"GPU-{n}") for n in range(2)]))
    monkeypatch.setattr(measure, "uses_gpu", lambda backend: True)
    timed: list[str] = []

    def work(*_: Any, **__: Any) -> tuple[Bandwidth, Cost]:
        timed.append(for_a_job()["CUDA_VISIBLE_DEVICES"])
        return Bandwidth(float(len(timed))), Cost(1.0)

    monkeypatch.setattr(measure, "work", work)
    found = []
    for visible in ("0", "1", "0,1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found.append(measure._copy_bandwidth(Console(quiet=True)))
    assert (found, timed) == ([1.0, 2.0, 1.0], ["GPU-0", "GPU-1"])


@pytest.mark.parametrize(("cuda", "rounds"), [(False, measure.ROUNDS), (True, 1)])
def test_on_a_gpu_all_repeats_are_timed_in_one_round(cuda: bool, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine takes a GPU's memory as a whole: no other job could come between."""
    given: list[Job] = []

    def in_rounds(function: str, job: Job, *_: object, **__: object) -> Any:
        given.append(job)
        raise WorkFailed("enough is known")

    recipe = parse(
        {"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}], "backends": {"llamacpp": {}}}, Path("r.yaml")
    )
    row = a_row(measured=False)
    monkeypatch.setattr(measure, "uses_gpu", lambda backend: cuda)
    monkeypatch.setattr(measure, "_copy_bandwidth", lambda show: None)
    monkeypatch.setattr(measure, "check", lambda *_: None)
    monkeypatch.setattr(measure, "in_rounds", in_rounds)
    made = Made(PreparedBase("p", "digest", "float32", 10, 40), {}, {})
    with pytest.raises(StopIteration) as end:
        next(measure.run_job(recipe, made, row, None, "llamacpp", Console()))
    assert end.value.value.error == "enough is known"
    assert [job.rounds for job in given] == [rounds] and measure.ROUNDS > 1
