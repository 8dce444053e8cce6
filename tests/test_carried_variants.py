"""`gguf: {from: NAME}` from the recipe to the table: one file, in every engine that reads GGUF."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, write_vocabulary
from tests.worker.wrappers import write_whole
from workbench.home import interpreter
from workbench.machine.identity import versions

TEXT = {"text": "The quick brown fox jumps over the lazy dog, and runs. " * 60}
VARIANTS = [{"gptq": {"group_size": 32}}, {"gguf": {"from": "gptq-4bit-g32"}}]
PARTS: dict[str, Any] = {
    "variants": VARIANTS,
    "calibration": {"source": TEXT, "windows": 4, "window": 32},
    "evaluation": {"source": TEXT, "windows": 2, "window": 32},
}


def test_a_recipe_that_cannot_be_carried_starts_nothing(bench: Bench) -> None:
    asked = bench.recipe(**{**PARTS, "variants": [{"gguf": "Q8_0"}, {"gguf": {"from": "gguf-Q8_0"}}]})
    answer = bench("run", asked)
    assert answer.returncode == 2 and answer.stdout == ""
    said = "cannot be carried to gguf: name a variant of awq or gptq or checkpoint, not one of gguf\n"
    assert answer.stderr.endswith(said)


@pytest.mark.slow
def test_what_was_not_made_is_not_carried(bench: Bench) -> None:
    """A group that does not divide the tiny model's 64 inputs is refused in the pass; the file says which was it."""
    variants = [{"gptq": {"group_size": 96}}, {"gguf": {"from": "gptq-4bit-g96"}}]
    answer = bench("quantize", bench.recipe(**{**PARTS, "variants": variants}))
    assert answer.returncode == 1
    assert "gguf-gptq-4bit-g96               failed: gptq-4bit-g96, which it is carried from, was not made" in (
        answer.stderr
    )


@pytest.mark.slow
def test_in_every_engine_that_reads_gguf(bench: Bench) -> None:
    """But vLLM, which reads it as any GGUF file (`tests/worker/backends/test_vllm_gguf.py`)."""
    backends: dict[str, Any] = {"transformers": {}, "llamacpp": {}}
    asked = bench.recipe(**PARTS, backends=backends)
    answer = bench("run", asked, "--variant", "gguf-gptq-4bit-g32", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    lines = {(line["variant"], line["backend"]): line for line in json.loads(answer.stdout)}
    for engine in backends:
        assert lines["gguf-gptq-4bit-g32", engine]["kld_mean"] < 1, "the same model, somewhat rounded"
    assert "gptq-4bit-g32" not in {variant for variant, _ in lines}, "made, but not asked for"
    rows = [row for row in bench.rows() if row["artifact"]["variant"] == "gguf-gptq-4bit-g32"]
    (path,) = {row["artifact"]["path"] for row in rows}
    assert Path(path).name == "Tiny-gptq-4bit-g32.gguf"
    assert all(row["artifact"]["provenance"]["carried"]["types"] == ["Q4_0"] for row in rows)
    assert all(any("equal bit for bit" in text for text in row["artifact"]["warnings"]) for row in rows)

    # The same file as llama.cpp's form of the checkpoint: nothing is made again.
    answer = bench("quantize", asked)
    assert answer.returncode == 0, answer.stderr
    found = [line.split() for line in answer.stdout.splitlines() if ".gguf" in line and "gptq" in line.split()[0]]
    assert [line[0] for line in found] == ["gptq-4bit-g32", "gguf-gptq-4bit-g32"]
    assert len({line[-1] for line in found}) == 1
    table = bench("table").stdout
    assert "gguf-gptq-4bit-g32" in table and "in blocks of Q4_0; weights equal bit for bit" in table


@pytest.mark.slow
def test_mlx_as_an_engine_and_as_a_variant(bench: Bench) -> None:
    """By the interpreter that `WORKBENCH_PYTHON_MLX` names, if it does."""
    if not versions(("mlx-lm",), interpreter("mlx", sys.executable)):
        pytest.skip("mlx-lm is not installed")
    variants = [{"gptq": {"group_size": 32}}, {"mlx": {"from": "gptq-4bit-g32"}}, {"gguf": "Q8_0"}]
    backends: dict[str, Any] = {"transformers": {"dtype": "float32", "kernel": "workbench"}, "mlx": {}}
    answer = bench("run", bench.recipe(**{**PARTS, "variants": variants}, backends=backends), "--format", "json")
    assert answer.returncode == 0, answer.stderr
    lines = {(line["variant"], line["backend"]): line for line in json.loads(answer.stdout)}
    for variant in ("base", "gptq-4bit-g32"):
        one, other = (lines[variant, engine]["perplexity"] for engine in backends)
        assert one == pytest.approx(other, rel=1e-4), "both in float32"
    assert lines["mlx-gptq-4bit-g32", "mlx"]["perplexity"] == lines["gptq-4bit-g32", "mlx"]["perplexity"]
    assert lines["mlx-gptq-4bit-g32", "mlx"]["decode_tok_s"] > 0
    assert lines["gguf-Q8_0", "mlx"]["unsupported"] == "mlx-lm does not read gguf"
    assert lines["mlx-gptq-4bit-g32", "transformers"]["unsupported"] == "transformers does not read mlx"
    (path,) = {row["artifact"]["path"] for row in bench.rows() if row["artifact"]["format"] == "mlx"}
    assert Path(path).name == "Tiny-gptq-4bit-g32-mlx"
    card = bench("card", "mlx-gptq-4bit-g32").stdout
    assert "library_name: mlx" in card and "mlx_lm.server --model Tiny-gptq-4bit-g32-mlx" in card


@pytest.mark.slow
def test_back_in_its_multimodal_model(tmp_path: Path) -> None:
    """Of text the whole model says what its language model does, and copies of the folder are whole."""
    model = tmp_path / "whole"
    write_whole(model, "qwen2_5_vl", {"vocab_size": 768})
    bench = Bench(tmp_path / "home", tmp_path, write_vocabulary(model))
    variants = [{"gptq": {"group_size": 32}}, {"whole": {"from": "gptq-4bit-g32"}}]
    backends: dict[str, Any] = {"transformers": {}, "llamacpp": {"variants": ["whole-*"]}}
    asked = bench.recipe(**MEASURED, variants=variants, backends=backends)
    answer = bench("run", asked, "--format", "json")
    assert answer.returncode == 0, answer.stderr
    lines = {(line["variant"], line["backend"]): line for line in json.loads(answer.stdout)}
    alone, whole = (lines[name, "transformers"] for name in ("gptq-4bit-g32", "whole-gptq-4bit-g32"))
    assert whole["kld_mean"] == pytest.approx(alone["kld_mean"], rel=0.05) and alone["kld_mean"] > 1e-3
    assert whole["bits_per_weight"] == alone["bits_per_weight"], "those of the language model"
    assert "GGUF files only" in lines["whole-gptq-4bit-g32", "llamacpp"]["unsupported"]
    assert "codes and scales in a Qwen2_5_VLForConditionalGeneration, beside" in bench("table").stdout
    planned = {need["variant"]: need for need in json.loads(bench("plan", asked, "--format", "json").stdout)}
    assert planned["whole-gptq-4bit-g32"]["disk_bytes"] == pytest.approx(whole["disk_bytes"], rel=0.02)
    answer = bench("quantize", asked, "--variant", "whole-gptq-4bit-g32", "-o", str(tmp_path / "copies"))
    (copy,) = (tmp_path / "copies").glob("*-whole")
    assert answer.returncode == 0 and "vision_config" in json.loads((copy / "config.json").read_text())
