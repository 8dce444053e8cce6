"""Whole runs over a cache, and a base, that changed behind their back."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.bench import Bench

pytestmark = pytest.mark.slow
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 8
PARTS = {
    "evaluation": {"source": {"text": TEXT}, "window": 32, "windows": 3},
    "variants": [{"gguf": "Q8_0"}, {"gguf": {"type": "Q4_0", "rounding": "compensated"}}],
    "calibration": {"source": {"text": TEXT[::-1]}, "window": 32, "windows": 4},
    "backends": {"llamacpp": {}},
}


@pytest.fixture
def place(tmp_path: Path, tiny_llama: Path) -> Bench:
    """A model and a cache of its own, which a test may spoil."""
    (tmp_path / "new").mkdir()
    return Bench(tmp_path / "new" / "home", tmp_path, Path(shutil.copytree(tiny_llama, tmp_path / "Tiny")))


def zero_tail(file: Path) -> None:
    """As a power cut leaves it: the name, the size and the time are there, the last blocks are not."""
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-min(status.st_size // 2, 100_000), os.SEEK_END)
        stream.write(bytes(min(status.st_size // 2, 100_000)))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def figures(place: Bench, *words: str) -> list[dict[str, object]]:
    answer = place("run", place.recipe(**PARTS), "--format", "json", *words)
    assert answer.returncode == 0, answer.stderr
    kept = ("variant", "perplexity", "kld_mean", "bits_per_weight", "disk_bytes", "error")
    return [{key: line[key] for key in kept} for line in json.loads(answer.stdout)]


def test_every_kind_of_file_in_the_cache_is_made_anew(place: Bench) -> None:
    first = figures(place)
    files = [
        *sorted(place.home.glob("artifacts/*/*.gguf")),
        *place.home.glob("tokens/*/evaluation.json"),
        *place.home.glob("references/*/*.safetensors"),
        *place.home.glob("imatrix/*/*.gguf"),
        *sorted(place.home.glob("grams/*/*.safetensors"))[:1],
    ]
    assert len(files) == 8
    for file in files:
        zero_tail(file)
    answer = place("cache", "verify")
    assert answer.returncode == 1 and len(answer.stdout.splitlines()) == 9
    answer = place("run", place.recipe(**PARTS), "--format", "json", "--again")
    assert answer.returncode == 0, answer.stderr
    told = [line for line in answer.stderr.splitlines() if line.startswith("warning: ")]
    assert sorted(line.split()[1] for line in told) == sorted(str(file) for file in files)
    assert figures(place) == first
    assert place("cache", "verify").returncode == 0


def test_a_base_that_was_spoiled_where_it_lies_is_refused_by_name(place: Bench) -> None:
    figures(place)
    whole = (place.model / "model.safetensors").read_bytes()
    zero_tail(place.model / "model.safetensors")
    for words in (["run"], ["run", "--again"], ["quantize"]):
        answer = place(words[0], place.recipe(**PARTS), *words[1:])
        assert answer.returncode == 2 and answer.stdout == ""
        (line,) = answer.stderr.splitlines()
        assert line.startswith(f"error: {place.model}/model.safetensors is not what it was when it was made")
    (place.model / "model.safetensors").write_bytes(whole)
    assert place("run", place.recipe(**PARTS)).returncode == 0


def test_a_base_that_was_edited_is_another_base_and_that_is_said(place: Bench, make_llama: object) -> None:
    first = figures(place)
    assert callable(make_llama)
    tokenizer = (place.model / "tokenizer.json").read_bytes()
    make_llama(place.model, seed=1)
    (place.model / "tokenizer.json").write_bytes(tokenizer)
    answer = place("run", place.recipe(**PARTS), "--format", "json")
    assert answer.returncode == 0
    said = "is not what it was: this is another base, and what is made of it is made anew"
    assert f"note: {place.model}/model.safetensors {said}" in answer.stderr
    lines = json.loads(answer.stdout)
    assert all(line["perplexity"] != old["perplexity"] for line, old in zip(lines, first, strict=True))


def test_a_base_that_changes_while_a_run_goes_on_is_a_failure(place: Bench) -> None:
    recipe = place.recipe(variants=[{"gguf": "Q8_0"}], backends={"fake": {}})
    place("quantize", recipe)
    load = {"prompt_tokens": 8, "new_tokens": 50, "repeats": 2}
    recipe = place.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}], workload=load, backends={"fake": {}})
    child = place.start("quantize", recipe)
    place.wait_for(lambda: any(place.home.glob("artifacts/*.partial")), child)
    zero_tail(place.model / "model.safetensors")
    child.communicate(timeout=120)
    answer = place("profile", recipe)
    assert answer.returncode == 2 and "model.safetensors is not what it was" in answer.stderr
