"""Models that an engine has its own words, or none, for: the same function where it takes them, one line elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, SIZES, rows_of, write_random

EAGER = {"enforce_eager": True}
SAME_NATS = 0.01
"""Of a base in an engine of 16 bits; another function is ten times that and more."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_sizes_under_other_names(kind: str, case: Bench) -> None:
    """GPT-2 says `n_head`, Bloom too, and Bloom's code in transformers has no sdpa."""
    from transformers import CONFIG_MAPPING

    named: dict[str, Any] = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")}
    write_random(case.model, CONFIG_MAPPING[kind](**named, num_hidden_layers=2, num_attention_heads=4))
    engines: dict[str, Any] = {"transformers": {}, "vllm": EAGER}
    answer = case("run", case.recipe(variants=[], **MEASURED, backends=engines))
    assert answer.returncode == 0, answer.stdout
    assert {key: row["kld_mean"] < SAME_NATS for key, row in rows_of(case).items()} == {
        ("base", name): True for name in engines
    }
