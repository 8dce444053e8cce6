"""Weights that float16 does not hold: brought into its range, or said to be lost."""

from __future__ import annotations

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, llama, rows_of, write_random


@pytest.mark.slow
def test_layers_beyond_float16_are_kept_or_said_to_be_lost(case: Bench) -> None:
    """A bfloat16 base: a norm's weights of 3e-8 before matrices as much larger, an up-projection of 1e-8 before a
    down-projection as much larger."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_random(case.model, llama()), dtype=torch.float32)
    with torch.no_grad():
        first, second = model.model.layers
        first.post_attention_layernorm.weight[:4] *= 3e-8
        first.mlp.gate_proj.weight[:, :4] /= 3e-8
        first.mlp.up_proj.weight[:, :4] /= 3e-8
        second.mlp.up_proj.weight *= 1e-7
        second.mlp.down_proj.weight *= 1e7
    model.to(torch.bfloat16).save_pretrained(case.model)
    variants = [{"gguf": "Q4_K_M"}, {"awq": {"group_size": 64}}, {"gptq": {"group_size": 64}}]
    backends = {"transformers": {"variants": ["base", "awq-*", "gptq-*"]}, "llamacpp": {"variants": ["base", "gguf-*"]}}
    ran = case("run", case.recipe(**MEASURED, variants=variants, backends=backends))
    rows = rows_of(case)
    for variant in ("awq-4bit-g64", "gptq-4bit-g64"):
        row = rows[variant, "transformers"]
        assert row["kld_mean"] < 0.2 and not any("of their" in text for text in row["warnings"]), variant
    lost = rows["gguf-Q4_K_M", "llamacpp"]
    assert ran.returncode == (1 if lost["error"] else 0)
    assert lost["error"] or any("blk.1.ffn_up.weight. Their scales are beyond" in text for text in lost["warnings"])
