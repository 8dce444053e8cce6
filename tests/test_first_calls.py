"""Quality is the same to the last digit in every process, on the processors where oneMKL's first calls race too."""

from __future__ import annotations

import hashlib
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench import first_calls
from workbench.machine import isolate

pytestmark = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")


def asked(function: str, folder: Path) -> Any:
    reply = isolate.call(
        f"tests.test_first_calls:{function}", None, workdir=folder, environment={"PYTHONPATH": str(ROOT)}
    )
    assert reply.error is None, reply.log
    return reply.value


def steps_of_the_import(payload: None, progress: object) -> list[object]:
    """Worker: `settled` for each time that torch's import called the functions, and whether its finder stayed."""
    calls: list[object] = []
    settle = first_calls.settle

    def heard(torch: Any) -> None:
        settle(torch)
        calls.append("settled")

    first_calls.settle = heard
    importlib.import_module("torch")
    return [*calls, any(isinstance(finder, first_calls._Finder) for finder in sys.meta_path)]


def test_a_worker_settles_them_once_when_it_imports_torch(tmp_path: Path) -> None:
    assert asked("steps_of_the_import", tmp_path) == ["settled", False]


def first_exp(payload: None, progress: object) -> str:
    """Worker: digest of the first `exp` of a process, of 31 positions of 512 logits."""
    import torch

    logits = torch.randn(31, 512, generator=torch.Generator().manual_seed(0))
    # As the processes did of which every third was seen to differ.
    hashlib.sha256(logits.numpy().tobytes())
    return hashlib.sha256(logits.exp().numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_every_process_computes_the_same_numbers(tmp_path: Path) -> None:
    """Without the calls every third process differs on a Xeon of two cores; twelve agree once in a hundred times."""
    assert len({asked("first_exp", tmp_path) for _ in range(12)}) == 1
