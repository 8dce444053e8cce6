"""Random weights of a shape, from the recipe to the table: speeds, memory, further points, two caches; no quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench.plan import make as plan
from workbench.recipe.load import load

SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RECIPE = {
    "name": "shape",
    "model": "Small-shape",
    "base": {"config": SHAPE, "init": "random"},
    "variants": [{"gguf": "Q4_K_M"}],
    "workload": {"prompt_tokens": [32, 8], "new_tokens": 8, "batch": [1, 3], "requests": 2, "repeats": 3},
    "backends": {"transformers": {"variants": ["base"]}, "llamacpp": {"kv_cache": ["f16", "q8_0"]}},
}


def workbench(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workbench.cli", *words, "--results", str(folder / "results")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WORKBENCH_HOME": str(folder / "home"), "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe has run."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "shape.yaml").write_text(json.dumps(RECIPE))
    answer = workbench(folder, "run", str(folder / "shape.yaml"), "--quiet")
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert "random weights of a given shape, so only speed and memory mean anything" in answer.stdout
    assert "pp8 " in answer.stdout and "tg8 @ d32 b3 " in answer.stdout and "served b3 " in answer.stdout
    return folder


@pytest.fixture(scope="module")
def objects(done: Path) -> list[dict[str, Any]]:
    answer = workbench(done, "table", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    return list(json.loads(answer.stdout))


@pytest.mark.slow
def test_every_pair_has_speeds_and_memory_and_no_quality(objects: list[dict[str, Any]]) -> None:
    assert [(one["variant"], one["backend"]) for one in objects] == [
        ("base", "transformers"),
        ("base", "llamacpp"),
        ("base", "llamacpp"),
        ("gguf-Q4_K_M", "llamacpp"),
        ("gguf-Q4_K_M", "llamacpp"),
    ]
    for one in objects:
        assert one["error"] is None and one["unsupported"] is None
        assert one["perplexity"] is one["kld_mean"] is one["perplexity_delta"] is None
        assert "random weights" in one["quality_missing"]
        for name in ("ttft_s", "itl_p50_s", "itl_p95_s", "itl_p99_s", "prefill_tok_s", "decode_tok_s", "load_s"):
            assert one[name] > 0, name
        assert one["itl_p50_s"] <= one["itl_p95_s"] <= one["itl_p99_s"]
        for name in ("prefill_tok_s", "decode_tok_s"):
            assert len(one[f"{name}_ci"]) == 2 and one[f"{name}_ci"][0] <= one[name] <= one[f"{name}_ci"][1]
        assert one["weights_bytes"] > 0 and one["kv_cache_bytes"] > 0 and one["workspace_bytes"] >= 0
        assert 0 < one["bandwidth_fraction"] < 5
        names = ["pp8", "tg8 @ d8", "pp32 b3", "tg8 @ d32 b3"]
        assert [name for name in one["points"] if "served" not in name] == names
        assert sum("served" in name for name in one["points"]) == 2
        assert all(point["median"] > 0 and len(point["ci"]) == 2 for point in one["points"].values())
    assert any("by groups" in name for name in objects[0]["points"])


@pytest.mark.slow
def test_the_plan_knew_the_weights_and_the_cache(done: Path, objects: list[dict[str, Any]]) -> None:
    made = plan.make(load(done / "shape.yaml"), context=40, batch=1, cuda=False)
    needs = [need for need in made.needs]
    assert len(needs) == len(objects)
    by_cache = {(n.variant, n.backend, n.options.get("kv_cache")): n for n in needs}
    sizes = sorted(one["kv_cache_bytes"] for one in objects if one["backend"] == "llamacpp")
    # A context of 40 tokens is rounded up to 256 by llama.cpp, and said in hundredths of a MiB.
    expected = sorted(n.kv_cache_bytes or 0 for key, n in by_cache.items() if key[1] == "llamacpp")
    assert sizes == pytest.approx(expected, abs=0.01 * 2**20)
    assert sizes[0] == pytest.approx(sizes[-1] * 34 / 64, rel=0.03)
    for one in objects:
        matching = [n for n in needs if (n.variant, n.backend) == (one["variant"], one["backend"])]
        if one["backend"] == "llamacpp":
            assert {n.disk_bytes for n in matching} == {one["weights_bytes"]}
        else:
            # DynamicCache holds all but the last token, in float32.
            assert one["kv_cache_bytes"] == pytest.approx((matching[0].kv_cache_bytes or 0) * 39 / 40)


@pytest.mark.slow
def test_rows_say_what_the_machine_did(done: Path) -> None:
    rows = [
        json.loads(line) for file in (done / "results").glob("*/rows.jsonl") for line in file.read_text().splitlines()
    ]
    assert len(rows) == 5
    for row in rows:
        seen = row["measurement"]["conditions"]
        assert {"others_cores", "clock_hz", "throttled", "probe_s", "page_cache_before"} <= set(seen)
        assert len(seen["probe_s"]) == 3 * 3 and min(seen["probe_s"]) > 0
        assert 0 <= seen["page_cache_before"] <= 1
        assert row["machine"]["copy_bytes_per_s"] > 1e8
        memory = row["measurement"]["memory"]
        assert memory["peak_rss"] > memory["peak_rss_anon"] > 0 and memory["peak_load"] > 0


@pytest.mark.slow
def test_a_workload_beyond_the_models_context_is_refused_at_once(done: Path) -> None:
    long = {**RECIPE, "workload": {"prompt_tokens": [32, 252], "new_tokens": 8}}
    (done / "long.yaml").write_text(json.dumps(long))
    answer = workbench(done, "run", str(done / "long.yaml"), "--quiet")
    assert answer.returncode == 2
    assert "long.yaml: workload: sequences of 260 tokens are longer than the model's context of 256" in answer.stderr


@pytest.mark.slow
def test_a_batch_that_llamacpp_does_not_take_is_refused_before_any_work(done: Path) -> None:
    """It takes 256 sequences at most."""
    wide = {**RECIPE, "name": "wide", "workload": {"prompt_tokens": 8, "new_tokens": 2, "batch": 300, "repeats": 1}}
    wide["backends"] = {"llamacpp": {"variants": ["base"]}}
    (done / "wide.yaml").write_text(json.dumps(wide))
    answer = workbench(done, "run", str(done / "wide.yaml"), "--quiet", "--format", "json")
    assert answer.returncode == 2 and answer.stdout == "", answer.stderr
    assert "300" in answer.stderr and "256" in answer.stderr
