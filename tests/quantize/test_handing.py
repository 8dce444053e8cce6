"""Artifacts where somebody wants them, under plain names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bench import Bench
from workbench.errors import UserError
from workbench.quantize.handing import copy_to
from workbench.records import Artifact


def an_artifact(path: Path) -> Artifact:
    return Artifact("awq", "awq", "awq", str(path), "d", 1, 1)


def test_files_go_where_they_are_wanted(bench: Bench) -> None:
    wanted = bench.folder / "models"
    for _ in range(2):
        answer = bench("quantize", bench.recipe(), "--output", str(wanted), "--quiet")
        assert answer.returncode == 0, answer.stderr
        assert [path.name for path in wanted.iterdir()] == ["Tiny-Q8_0.gguf"]
        assert re.search(rf"^gguf-Q8_0 .* MiB  {wanted}/Tiny-Q8_0.gguf$", answer.stdout, re.MULTILINE)
    (wanted / "Tiny-Q8_0.gguf").write_text("mine")
    answer = bench("quantize", bench.recipe(), "--output", str(wanted), "--quiet")
    assert answer.returncode == 2 and "something else is there already; remove it" in answer.stderr


def test_a_copy_is_no_door_to_the_cache(tmp_path: Path) -> None:
    made = tmp_path / "cache" / "Model-awq"
    (made / "inner").mkdir(parents=True)
    (made / "inner" / "w.safetensors").write_text("weights")
    copied = copy_to(tmp_path / "out", an_artifact(made))
    (copied / "inner" / "w.safetensors").write_text("spoiled")
    assert (made / "inner" / "w.safetensors").read_text() == "weights"
    with pytest.raises(UserError, match="name another --output"):
        copy_to(tmp_path / "out", an_artifact(made))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Model-awq"]


def test_links_to_others_files_are_copied_as_files_and_all_parts_of_one_that_is_split(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for number in (1, 2, 3):
        theirs = tmp_path / f"theirs-{number}"
        theirs.write_text(f"part {number}")
        (tmp_path / "cache" / f"X-{number:05}-of-00003.gguf").symlink_to(theirs)
    first = copy_to(tmp_path / "out", an_artifact(tmp_path / "cache" / "X-00001-of-00003.gguf"))
    assert first.name == "X-00001-of-00003.gguf"
    copies = sorted((tmp_path / "out").iterdir())
    assert [each.read_text() for each in copies] == ["part 1", "part 2", "part 3"]
    assert not any(each.is_symlink() for each in copies)
