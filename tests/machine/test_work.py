"""A worker's folders: its temporary files go with it, its log stays where it failed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench.console import Console
from workbench.errors import WorkFailed
from workbench.machine.work import work


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

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
