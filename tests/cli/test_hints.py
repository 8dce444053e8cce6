"""What is said after an answer: where things are, and commands that can be typed as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.bench import Bench
from tests.command import command


@pytest.fixture(scope="module")
def measured(shared_home: Path, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Bench:
    """A finished run, to be looked at."""
    place = Bench(shared_home, tmp_path_factory.mktemp("measured"), tiny_llama)
    assert place("run", place.recipe(), "--quiet").returncode == 0
    return place


def test_a_table_is_followed_by_where_things_are_and_what_to_type(measured: Bench) -> None:
    again = measured("run", measured.recipe(), "--format", "terminal")
    (row, *_) = measured.rows()
    here = row["machine"]["name"]
    told = [line for line in again.stderr.splitlines() if not line.startswith("note: ")]
    assert re.fullmatch(
        r"nothing to do: all 2 pairs were measured before, the last \S+Z; --again measures anew", told[0]
    )
    assert told[1] == f"rows:  {measured.results}/{here}" and (measured.results / here / "rows.jsonl").exists()
    assert told[2].startswith(f"files: {measured.home}/artifacts; ") and (measured.home / "artifacts").is_dir()
    for line in told[3:]:
        words = shlex.split(line.removeprefix("next:").partition("#")[0])
        assert words[0] == "workbench"
        if "-o" in words:
            words[words.index("-o") + 1] = str(measured.folder / "page.html")
        assert command(*words[1:], environment=measured.environment()).returncode in (0, 1), words
    assert measured("run", measured.recipe(), "--quiet").stderr == ""
    assert measured("run", measured.recipe(), "--format", "csv").stderr == f"{told[0]}\n"


def test_quantize_says_how_to_take_the_files_and_how_to_measure_them(bench: Bench) -> None:
    recipe = bench.recipe()
    told = bench("quantize", recipe).stderr.splitlines()[-2:]
    assert told[0].startswith(f"next:  workbench quantize {recipe} -o DIR ")
    assert told[1].startswith(f"       workbench profile {recipe} ")
