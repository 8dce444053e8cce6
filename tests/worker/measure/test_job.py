"""In which order a job is measured where a GPU computes: a real engine on a CPU that says it is on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fake_driver import NVML, FakeGpu
from tests.worker.small_models import write_model
from workbench.records import Artifact, Evaluation, Job, Measurement, Workload, to_json
from workbench.worker.backends import transformers as backend
from workbench.worker.measure import energy, job

pytest.importorskip("transformers")
NEW = 12


class Engine(backend.Engine):
    """Notes what it is asked."""

    device = "cuda"

    def __init__(self, asked: Job) -> None:
        super().__init__(asked)
        self.notes: list[Any] = []

    def settings(self) -> dict[str, object]:
        return super().settings() | {"device": self.device}

    def forget_peak(self) -> None:
        super().forget_peak()
        if hasattr(self, "notes"):
            self.notes.append("forget")

    def score(self, asked: Any, progress: Callable[[int], object]) -> Any:
        self.notes.append(("score", len(asked.windows), bool(asked.reference)))
        return super().score(asked, progress)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        self.notes.append((len(prompts), new_tokens))
        yield from super().generate(prompts, new_tokens)

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        self.notes.append(("serve", len(prompts), max(new_tokens)))
        yield from new_tokens


def measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, compiled: list[str] | None = None, server: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    path = write_model(folder / "llama", "llama")
    tokens = folder / "tokens.json"
    windows = [[1, *range(10, 40)], [1, *range(50, 80)]]
    tokens.write_text(json.dumps({"windows": windows, "score_from": [3, 3], "vocab_size": 354}))
    artifact = Artifact("v", "base", "safetensors", str(path), "", 1, 1)
    load = Workload(prompt_tokens=[8], new_tokens=NEW, batches=[1, 2], repeats=2, warmup=2, requests=4)
    test = Evaluation("e", str(tokens), "", window=31, score="all", windows=2, scored_tokens=54)
    asked = Job("b", artifact, "transformers", {"device": "cpu", "threads": 1}, load, {"e": test})
    made: list[Engine] = []

    def load_one(given: Job) -> Engine:
        engine = Engine(given)
        engine.device = device
        made.append(engine)
        return engine

    def compile_for(given: Job) -> None:
        assert not made and compiled is not None
        compiled.append(given.artifact.variant)

    extra = {} if compiled is None else {"compile_for": compile_for}
    monkeypatch.setattr(job, "_engine", lambda given: SimpleNamespace(Engine=load_one, SERVER=server, **extra))
    monkeypatch.setattr(job, "check_spelling", lambda *_: None)
    answer: Any = job.measure(to_json(asked), lambda *_: None)
    return made[0].notes, answer


def test_on_a_gpu_nothing_that_is_timed_is_the_first_of_its_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window is scored before scoring is timed; a point's first warm-up runs through all lengths of the cache, and
    what is served too."""
    notes, _ = measured(tmp_path, monkeypatch, "cuda")
    assert notes[:3] == [("score", 1, False), ("score", 2, False), "forget"]
    points = [(batch, new) for batch in (1, 2) for new in (NEW, 8, NEW, NEW)]
    assert notes[3:11] == points
    for slots, (warm, *timed) in zip((1, 2), (notes[11:14], notes[14:17]), strict=True):
        assert warm[:2] == ("serve", slots)
        assert all(note == ("serve", 4 * slots, warm[2]) and NEW < note[2] <= NEW * 3 // 2 for note in timed)


def test_on_a_cpu_warm_ups_stay_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, answer = measured(tmp_path, monkeypatch, "cpu")
    assert notes[:6] == [("score", 2, False), "forget", (1, 8), (1, 8), (1, NEW), (1, NEW)]
    assert ("serve", 1, 2) in notes and ("serve", 2, 2) in notes
    spans = answer["conditions"]["repeats_s"]
    assert len(spans) == 2 * 2 + 2 * 2 and all(began <= ended for began, ended in spans)
    assert all(one[1] <= two[0] for one, two in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize(("device", "whole"), [("cuda", True), ("cpu", False)])
def test_a_server_on_a_gpu_is_told_to_be_warmed_up_wholly(
    device: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*given: Any) -> Measurement:
        assert given[-1] is whole
        return Measurement(device)

    monkeypatch.setattr(job.over_http, "measure", measure)
    assert measured(tmp_path, monkeypatch, device, server=True)[1]["device"] == device


def test_a_row_names_the_counters_its_joules_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor's cannot be read, they are the GPU's alone, and not the whole machine's."""
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(joules=5.0)]))
    monkeypatch.setattr(job, "Meter", lambda: energy.Meter(tmp_path / "none"))
    _, answer = measured(tmp_path, monkeypatch, "cuda")
    assert answer["settings"]["energy_of"] == "NVIDIA H100 80GB HBM3"
    assert answer["speeds"][0]["energy_j"] == [0.0, 0.0]


def test_kernels_are_compiled_before_loading_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    _, answer = measured(tmp_path, monkeypatch, "cpu", compiled)
    assert compiled == ["v"] and answer["settings"]["compile_s"] >= 0
