"""A run in a home whose name other forms of text write otherwise: no row names it, and its rows are found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.bench import Bench
from workbench.report import store

NAME = 'o\'brien ö "x"'
EVALUATION = {"name": "e", "source": {"text": "the quick brown fox " * 60}, "window": 32, "windows": 2}


@pytest.mark.slow
def test_no_row_names_the_home_and_its_files_are_found(tmp_path: Path, tiny_llama: Path) -> None:
    own = tmp_path / NAME
    model = own / "models" / "Tiny"
    shutil.copytree(tiny_llama, model)
    bench = Bench(own / "cache", own, model)
    backends = {"fake": {}, "llamacpp": {"threads": 1}}
    recipe = bench.recipe(backends=backends, evaluation=EVALUATION)
    for words in (("run", recipe), ("run", bench.recipe("broken", backends={"fake": {"do": "raise"}}))):
        done = bench(*words, HOME=str(own))
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    lines = [line for file in bench.results.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) >= 4 and any(json.loads(line)["error"] for line in lines)
    for form in (NAME, "brien", r"\u00f6", "ö"):
        assert not [line for line in lines if form in line]
    rows, warnings = store.read(bench.results)
    assert warnings == [] and all(row.artifact.path.startswith(("$WORKBENCH_HOME/", "~/")) for row in rows)
    assert bench("recommend", HOME=str(own)).stderr.count("its files are not here") == 0
    again = bench("run", recipe, HOME=str(own))
    assert again.returncode == 0 and len(store.history(bench.results)[0]) == len(lines)
