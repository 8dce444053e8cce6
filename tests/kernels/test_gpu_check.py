"""`benchmarks/gpu_check.py` and its parts on the CPU at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT

pytest.importorskip("torch")

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT / "kernels"), *sys.path])
    import gpu_check

    return gpu_check


@pytest.fixture
def place(check: Any, tmp_path: Path) -> Any:
    work = tmp_path / "work"
    work.mkdir()
    return check.Place(
        work,
        tmp_path / "results",
        device="cpu",
        shapes=((96, 256),),
        engines=("transformers",),
        processes=1,
        layer={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
        },
        calibration_windows=(8, 32),
    )


@pytest.mark.slow
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    answer = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1)
    assert answer.stderr.startswith("gpu_check.py checks a GPU, and torch sees none")


def test_the_limits_are_ten_minutes(check: Any) -> None:
    assert sum(part.LIMIT_S for part in check.PARTS.values()) <= 600


def test_environment(check: Any, place: Any) -> None:
    found = {one.what: one for one in check.environment.find(place)}
    assert found["torch"].holds and found["results can be written"].holds
    assert found["vllm"].holds is None


def test_versions_are_compared_as_numbers(check: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, holds in (("2.9.1", False), ("2.11.0+cu130", True), (None, False)):
        monkeypatch.setattr(check.environment, "installed", lambda package, version=version: version)
        assert next(check.environment.find(place)).holds is holds


@pytest.mark.slow
def test_kernels_in_the_interpreter(check: Any) -> None:
    """In a process of its own: Triton reads `TRITON_INTERPRET` when it is first imported."""
    pytest.importorskip("triton")
    program = """
import gpu_check, gpu_parts, pathlib
place = gpu_parts.Place(pathlib.Path("w"), pathlib.Path("r"), "cpu", ((32, 256),), (("decode", 1), ("prefill", 3),
                        ("dense", 3)), processes=1)
for found in gpu_check.kernels.find(place):
    print(found.holds, found.what, found.found)
"""
    answer = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "kernels")]),
        },
    )
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == 15 and all(line.startswith("True ") for line in lines), answer.stdout


def test_speed_is_held_against_the_goals(check: Any) -> None:
    from bench import Measured, row_of

    fast = Measured(1, 8_000_000, 9_000_000, 1e-3, [3.1e-6, 3.0e-6, 2.9e-6], 1.0e-5)
    row = row_of("Q4_K", "Llama-3.1-8B", "auto", 4096, 4096, fast, 3.5e12)
    found = check.speed.finding("Q4_K", 4096, 4096, row)
    assert found.holds is True and found.found == "3.0 us, 0.86 of copy, 3.33 x fp16"
    slow = row_of("Q4_K", "Llama-3.1-8B", "auto", 4096, 4096, replace(fast, torch_fp16_s=9.0e-6), 3.5e12)
    assert check.speed.finding("Q4_K", 4096, 4096, slow).holds is False
    assert check.speed.finding("Q6_K", 4096, 4096, slow).holds is True, "fp16 is a goal of 4 bits alone"
    wrong = row_of("Q4_K", "Llama-3.1-8B", "auto", 4096, 4096, replace(fast, samples_s=[]), 3.5e12)
    assert check.speed.finding("Q4_K", 4096, 4096, wrong).holds is False


def test_encoders(check: Any, place: Any) -> None:
    found = list(check.encoders.find(place))
    same = [one for one in found if "rows as" in one.what]
    assert len(same) == 10 and all(one.holds for one in same)
    assert all(one.values["weights_s"] > 0 for one in found if "encoded" in one.what)


def test_calibration_is_extrapolated_and_says_so(check: Any) -> None:
    seconds = [{"forward": 4.0, "awq": 1.0}, {"forward": 5.0, "awq": 3.0}]
    found = check.calibration.finding(seconds, [8.0, 12.0], (1, 3), 32, (128, 512))
    assert found.values["extrapolated_s"] == 12.0 + 2.0 * 29
    assert "2.0 s a layer (forward 0.50, awq 1.00)" in found.found
    assert "extrapolated, not measured: 70 s for all" in found.found and found.holds is True


@pytest.mark.slow
def test_calibration(check: Any, place: Any) -> None:
    (found,) = check.calibration.find(place)
    assert found.values["layers"] == (1, 3)
    assert all(set(seconds) > {"forward", "awq", "gptq"} for seconds in found.values["seconds"])


@pytest.mark.slow
def test_the_tiny_recipe(check: Any, place: Any) -> None:
    pytest.importorskip("transformers")
    found = list(check.recipe.find(place))
    assert {one.what for one in found} >= {"base in transformers"}
    assert all(one.holds is not False for one in found), found


def test_a_row_says_why_it_does_not_hold(check: Any) -> None:
    row = {"variant": "awq", "backend": "vllm", "unsupported": None, "error": None, "decode_tok_s": 9.0}
    row |= {"device": "cpu", "perplexity": 12.0}
    assert check.recipe.finding(row, "cuda").holds is False, "an engine that fell back to the CPU"
    assert check.recipe.finding(row | {"device": "cuda:0"}, "cuda").holds is True
    assert check.recipe.finding(row | {"error": "it died"}, "cuda").found == "it died"
    assert check.recipe.finding(row | {"unsupported": "does not load it"}, "cuda").holds is None


def test_what_ends_a_part_is_its_last_line(check: Any, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(place: Any) -> Any:
        yield check.Finding("first", "found")
        import no_such_module  # noqa: F401

    monkeypatch.setattr(check.environment, "find", part)
    first, last = check.found_by("environment", place)
    assert first.what == "first" and last.holds is None and "no_such_module" in last.found


@pytest.mark.slow
def test_a_part_that_hangs_is_ended(check: Any, tmp_path: Path) -> None:
    (found,) = check.in_a_process("environment", 0.05, tmp_path)
    assert found.holds is False and found.found == "not done after 0 s"


def test_the_table_and_the_rows(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench

    monkeypatch.setattr(bench, "machine", lambda: {"gpu": "NVIDIA H100 80GB", "torch": "2.11", "triton": "3.6"})
    lines = [check.Finding("copy", "3000 GB/s"), check.Finding("Q4_K", "0.5 of copy", "0.85", False)]
    monkeypatch.setattr(check, "in_a_process", lambda *_: iter(lines))
    assert check.report(["speed"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert "  NO   Q4_K" in shown and "0 hold, 1 do not, 1 say nothing" in shown
    rows = [json.loads(line) for line in (tmp_path / "nvidia-h100-80gb/gpu-check.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["copy", "Q4_K"] and rows[1]["gpu"] == "NVIDIA H100 80GB"
    lines.pop()
    assert check.report(["speed"], tmp_path) == 0
