"""Windows and contexts: what is scored does not depend on what is timed, and what an engine cannot do with windows is
said.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, SIZES, llama, rows_of, write_random

ONLY = {"variants": ["base"]}
EVERY: dict[str, Any] = {"transformers": ONLY, "vllm": {**ONLY, "enforce_eager": True}, "llamacpp": ONLY}


def longrope(folder: Path, original: int) -> Path:
    """A Phi-3 whose short and long rope factors are far from each other."""
    from transformers import Phi3Config

    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + 0.02 * i for i in range(16)],
        "long_factor": [1 + 3.0 * i for i in range(16)],
        "original_max_position_embeddings": original,
    }
    sizes = {**SIZES, "max_position_embeddings": 2048, "original_max_position_embeddings": original}
    config = Phi3Config(**sizes, pad_token_id=0, sliding_window=None, rope_parameters=rope)
    return write_random(folder, config, qk=6.0)


@pytest.mark.slow
@pytest.mark.parametrize("window", [64, 128, 192])
def test_a_longrope_model_is_scored_in_a_context_of_its_windows(window: int, case: Bench) -> None:
    """Its original context is 128 tokens. llama.cpp's is 256 at the least, vLLM's a token longer than a window."""
    longrope(case.model, 128)
    for prompt_tokens in (16, 256) if window == 64 else (256,):
        parts = {
            "evaluation": {**MEASURED["evaluation"], "window": window},
            "workload": {**MEASURED["workload"], "prompt_tokens": prompt_tokens},
            "name": f"prompts-of-{prompt_tokens}",
        }
        assert case("run", case.recipe(**parts, backends=EVERY)).returncode == 0
    found: dict[tuple[str, str], set[float]] = {}
    for row in json.loads(case("table", "--format", "json").stdout):
        found.setdefault((row["variant"], row["backend"]), set()).add(row["kld_mean"])
    assert len(found) == 3
    for pair, klds in found.items():
        assert len(klds) == 1 and max(klds) < 0.01, (pair, klds)


@pytest.mark.slow
def test_a_longrope_model_in_servers(case: Bench) -> None:
    """A server decides by the room that it makes: vLLM's is told the factors of the windows, llama.cpp's cannot be."""
    pytest.importorskip("xllamacpp")
    longrope(case.model, 128)
    parts = {
        "evaluation": {**MEASURED["evaluation"], "window": 64},
        "workload": {**MEASURED["workload"], "prompt_tokens": 256},
    }
    backends = {"transformers": ONLY, "vllm-serve": {**ONLY, "enforce_eager": True}, "llama-server": ONLY}
    # vLLM's sockets lie in the folder for temporary files, and their names may have 107 letters.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        assert case("run", case.recipe(**parts, backends=backends), TMPDIR=short).returncode == 0
    rows = rows_of(case)
    told = {
        backend: any("takes the long rope factors" in text for text in row["warnings"])
        for (_, backend), row in rows.items()
    }
    assert rows["base", "vllm-serve"]["kld_mean"] < 0.01 < 0.1 < rows["base", "llama-server"]["kld_mean"]
    assert told == {"transformers": False, "vllm-serve": False, "llama-server": True}


@pytest.mark.slow
def test_a_sliding_window_that_an_engine_leaves_out_is_said_in_each_of_its_rows(case: Bench) -> None:
    from transformers import MistralConfig

    write_random(case.model, MistralConfig(**SIZES, sliding_window=32), qk=6.0)
    variants = [{"gguf": "Q8_0"}, {"gptq": {"group_size": 64}}]
    backends = {"transformers": {"variants": ["base"]}, "llamacpp": {}}
    assert case("run", case.recipe(**MEASURED, variants=variants, backends=backends)).returncode == 0
    rows = rows_of(case)
    assert rows["base", "llamacpp"]["kld_mean"] > 1
    for (variant, backend), row in rows.items():
        for words in ("llama.cpp leaves out the sliding window of 32 tokens", "runs the base as another model"):
            expected = backend == "llamacpp" and not row["unsupported"]
            assert any(words in text for text in row["warnings"]) >= expected, (variant, backend, words)
            assert backend == "llamacpp" or not any(words in text for text in row["warnings"])
    table = case("table").stdout
    assert "llama.cpp leaves out the sliding window of 32 tokens" in table and "as another model" in table
    # Windows within it are the same function.
    short = {**MEASURED, "evaluation": {**MEASURED["evaluation"], "window": 32}}
    recipe = case.recipe(**short, name="short", backends={"llamacpp": ONLY})
    assert case("run", recipe).returncode == 0
    row = rows_of(case)["base", "llamacpp"]
    assert row["kld_mean"] < 0.01 and not any("another model" in text for text in row["warnings"])


@pytest.mark.slow
def test_windows_longer_than_the_context_are_refused_before_any_work(case: Bench) -> None:
    write_random(case.model, llama(max_position_embeddings=64))
    answer = case("run", case.recipe(**MEASURED, backends=EVERY))
    assert answer.returncode == 2
    told = answer.stderr.splitlines()[-1]
    assert "windows of 128 tokens are longer than the model's context of 64: use a shorter `window`" in told
    assert not case.rows() and not (case.home / "artifacts").exists() and not (case.home / "tokens").exists()


@pytest.mark.slow
def test_a_context_that_nobody_states_is_said_and_refuses_nothing(case: Bench) -> None:
    write_random(case.model, llama())
    file = case.model / "config.json"
    config = json.loads(file.read_text())
    del config["max_position_embeddings"]
    file.write_text(json.dumps(config))
    answer = case("quantize", case.recipe(**MEASURED, backends={"transformers": ONLY}))
    assert answer.returncode == 0, answer.stderr
    words = (
        "note: unchecked, since the base's configuration does not say how long its context is, in tokens: workload: "
    )
    assert words in answer.stderr and "evaluation 'evaluation': 128" in answer.stderr
    assert words in case("plan", case.recipe(**MEASURED, backends={"transformers": ONLY})).stdout
