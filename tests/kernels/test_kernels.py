"""Every operation against its format's own de-quantizer, in Triton's interpreter; on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.kernel_cases import cases, name_of, run, tolerance
from tests.places import ROOT

pytest.importorskip("torch")
pytest.importorskip("gguf")

HERE = Path(__file__).resolve().parent
KERNELS = ROOT / "kernels"
CASES = {name_of(case): case for case in cases()}
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed; the references are tested without")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    """The outcome of every case, from one process in which Triton interprets."""
    answer = subprocess.run(
        [sys.executable, "-P", str(HERE / "kernel_cases.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(KERNELS)]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert answer.returncode == 0, answer.stderr
    return {found["id"]: found for found in map(json.loads, answer.stdout.splitlines())}


def test_the_cases_are_all_there_is() -> None:
    from workbench_kernels.gguf.types import BLOCK_TYPES

    assert {case["kind"] for case in CASES.values() if case["op"] == "blocks"} == set(BLOCK_TYPES)
    assert {case["bits"] for case in CASES.values() if case["op"] == "gptq"} == {2, 4, 8}
    assert len(CASES) == len(list(cases()))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, interpreted: dict[str, dict[str, Any]]) -> None:
    check(CASES[name], interpreted[name])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["as it is", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: str) -> None:
    case = CASES[name] | ({} if dtype == "as it is" else {"dtype": dtype})
    check(case, run(case, "cuda"))


def check(case: dict[str, Any], found: dict[str, Any]) -> None:
    assert "error" not in found, found["error"]
    assert found["same"], "de-quantizing is exact in float32"
    assert found["steady"], "a launch can be repeated"
    assert found["dtype"] == case["dtype"]
    assert found["matmul"] < tolerance(case) and found["reference"] < tolerance(case), found


@pytest.mark.slow
@pytest.mark.parametrize("program", ["bench.py", "bench_decode.py"])
def test_benchmarks_say_that_they_need_a_gpu(program: str) -> None:
    answer = subprocess.run(
        [sys.executable, str(KERNELS / program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(f"{program} measures a GPU, and torch sees none") and answer.stderr.count("\n") == 1
