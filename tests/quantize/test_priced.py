"""Files of a wanted size, from a recipe to what lies in a folder: priced once, chosen for each size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.bench import Bench

CALIBRATION = {"source": {"module": "pydoc_data.topics"}, "window": 64, "windows": 8}


@pytest.mark.slow
def test_one_pass_prices_for_every_size(bench: Bench, tmp_path: Path) -> None:
    """The second recipe asks for another size and runs no pass; its file is within its bytes, with its types beside."""
    first = bench.recipe("first", variants=[{"gguf": {"like": "Q4_0"}}], calibration=CALIBRATION)
    answer = bench("quantize", first, "--output", str(tmp_path / "out"))
    assert answer.returncode == 0, answer.stderr
    assert "prices of types" in answer.stderr
    assert re.search(r"gguf-like-Q4_0: predicted divergence \d\.\d{4}; ", answer.stderr)
    wanted = [{"gguf": {"size": "120KiB"}}, {"gguf": {"size": "1KiB"}}, {"gguf": {"bits": 6}}]
    second = bench.recipe("second", variants=wanted, calibration=CALIBRATION)
    answer = bench("quantize", second, "--output", str(tmp_path / "out"))
    assert answer.returncode == 1 and "prices of types" not in answer.stderr
    assert re.search(r"gguf-1KiB failed: size: 1KiB leaves 0\.0 MiB for weights, and 0\.\d MiB to", answer.stderr)
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == sorted(
        f"Tiny-{name}.gguf{more}" for name in ("like-Q4_0", "120KiB", "6-bits") for more in ("", ".tensor-types.txt")
    )
    assert files["Tiny-120KiB.gguf"].stat().st_size <= 120 * 2**10
    lines = files["Tiny-6-bits.gguf.tensor-types.txt"].read_text().splitlines()
    assert all(re.fullmatch(r"\^[\w\\.]+\$=[\w]+", line) for line in lines)
    records = [json.loads(path.read_text()) for path in (bench.home / "artifacts").glob("*/artifact.json")]
    (choice,) = [r["provenance"]["choice"] for r in records if r["variant"] == "gguf-like-Q4_0"]
    assert 0 < choice["divergence"] < choice["like"]


def test_a_plan_says_what_is_possible(bench: Bench) -> None:
    keep = {"bits": 6, "keep": {"blk.9.*": "Q8_0"}}
    wanted = [{"gguf": {"bits": 6}}, {"gguf": {"size": "9GiB"}}, {"gguf": keep, "name": "kept"}]
    answer = bench("plan", bench.recipe(variants=wanted, calibration=CALIBRATION, backends={"llamacpp": {}}))
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"gguf-6-bits +llamacpp +[56]\.\d\d", answer.stdout)
    assert "is chosen by prices when it is made; " in answer.stdout
    assert "size: 9GiB leaves 9216.0 MiB for weights, and " in answer.stdout
    assert "keep: no tensor is called 'blk.9.*'" in answer.stdout
