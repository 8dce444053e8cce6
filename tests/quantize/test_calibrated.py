"""Which pass makes a calibrated variant, from a recipe to its folder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.fake_driver import NVML, FakeGpu
from tests.worker.small_models import write_model
from workbench.console import Console
from workbench.errors import WorkFailed
from workbench.quantize import calibrated
from workbench.recipe.choices import making_of
from workbench.recipe.load import parse
from workbench.records import CalibrationTokens, PreparedBase

CALIBRATION = {"source": {"module": "pydoc_data.topics"}, "window": 64, "windows": 8}
BOTH = [{"gptq": {"group_size": 32, "objective": objective}} for objective in ("input", "output")]


@pytest.mark.slow
def test_the_output_as_objective_takes_a_pass_of_its_own(bench: Bench) -> None:
    """Made once, by gradients; kept apart from the same variant without; said to be impossible of experts alone."""
    recipe = bench.recipe("both", variants=BOTH, calibration=CALIBRATION)
    # Passes of other tests that were ended leave theirs, to be resumed.
    before = {*(bench.home / "states").glob("*")}
    theirs = {*(bench.home / "artifacts").glob("*")}
    answer = bench("quantize", recipe)
    assert answer.returncode == 0, answer.stderr
    assert "calibration pass: gptq-4bit-g32:" in answer.stderr
    assert "calibration pass: gptq-4bit-g32-output:" in answer.stderr
    made = {*(bench.home / "artifacts").glob("*")} - theirs
    records = [json.loads((folder / "artifact.json").read_text()) for folder in made]
    phases = {record["variant"]: set(record["provenance"].get("seconds", ())) for record in records}
    assert "gram" in phases["gptq-4bit-g32"] and "backward" not in phases["gptq-4bit-g32"]
    assert "backward" in phases["gptq-4bit-g32-output"]
    assert {*(bench.home / "states").iterdir()} == before, "hidden states are large"
    assert "calibration pass" not in bench("quantize", recipe).stderr


@pytest.mark.slow
def test_one_pass_that_fails_leaves_the_others_variants(bench: Bench) -> None:
    vocabulary = json.loads((bench.model / "config.json").read_text())["vocab_size"]
    experts = write_model(bench.folder / "experts", "mixtral", vocab_size=vocabulary)
    for file in bench.model.glob("*token*.json"):
        shutil.copy2(file, experts)
    answer = bench(
        "quantize", bench.recipe("experts", base={"path": str(experts)}, variants=BOTH, calibration=CALIBRATION)
    )
    assert answer.returncode == 1
    assert "takes no model with experts yet" in answer.stderr
    made = [line.split()[0] for line in answer.stdout.splitlines() if "bits/weight" in line]
    assert made == ["base", "gptq-4bit-g32"]


@pytest.mark.parametrize(
    ("said", "forward"), [({}, "GPU-2,GPU-0,GPU-1"), ({"devices": 1}, "GPU-2"), ({"devices": 2}, "GPU-2,GPU-0")]
)
def test_a_pass_sees_the_gpus_that_share_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], forward: str
) -> None:
    """`auto`, the default, shares it out over all; the pass by gradients is of one GPU always."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(uuid=f"GPU-{n}") for n in range(3)]))
    given: dict[str, dict[str, str]] = {}

    def work(function: str, *_: Any, environment: dict[str, str], **__: Any) -> None:
        given[function] = environment
        raise WorkFailed("no")

    monkeypatch.setattr(calibrated, "work", work)
    monkeypatch.setattr(calibrated, "check", lambda *_: None)
    whole = {"base": {"path": "x"}, "variants": BOTH, "calibration": CALIBRATION | said}
    recipe = parse({**whole, "backends": {"transformers": {}}}, Path("r"))
    base, tokens = PreparedBase("p", "digest", "float32", 10, 40), CalibrationTokens("t", "t")
    wanted = {each.name: (each, making_of(each)) for each in recipe.variants if each.method == "gptq"}
    calibrated.run_calibration(recipe, base, tokens, wanted, Console(quiet=True), {})
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert given == {
        "workbench.worker.calibration.run:run": {**order, "CUDA_VISIBLE_DEVICES": forward},
        "workbench.worker.calibration.outputs:run": {**order, "CUDA_VISIBLE_DEVICES": "GPU-2"},
    }
