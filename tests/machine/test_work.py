"""A worker's answer is a record, or the job fails with a line that says what of it is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.places import ROOT
from workbench.console import Console
from workbench.errors import WorkFailed
from workbench.machine.work import work
from workbench.records import Bandwidth


@pytest.mark.parametrize("said", [{"bytes_per_s": "fast"}, {"bytes_per_s": -1}, {}, 7, None])
def test_an_answer_of_another_shape_is_a_failure_and_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
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
