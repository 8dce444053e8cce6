"""Folders and files that hold more than a text model, or less than it was: what counts, and what is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, llama, rows_of, write_random

pytestmark = pytest.mark.slow

VLLM: dict[str, Any] = {"enforce_eager": True, "variants": ["base", "awq-*"]}
GGUF = {"variants": ["base", "gguf-*"]}
RECOGNIZABLE_NATS = 0.2
"""A 4-bit variant of such a model is within it of the base, another model is not."""


def test_a_head_that_the_configuration_disowns_is_kept_by_every_variant(case: Bench) -> None:
    """Tied by its configuration, but the file holds a head of its own, as mergekit and LoRA merges leave it. Without it
    the perplexity would be five times the base's."""
    write_random(case.model, llama())
    file = case.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    variants = [{"gguf": "Q8_0"}, {"awq": {"group_size": 64}}, {"gptq": {"group_size": 64}}]
    backends = {"transformers": {"variants": ["base", "gptq-*"]}, "vllm": VLLM, "llamacpp": GGUF}
    assert case("run", case.recipe(**MEASURED, variants=variants, backends=backends)).returncode == 0
    rows = rows_of(case)
    assert len(rows) == 6
    for (variant, backend), row in rows.items():
        assert row["kld_mean"] < RECOGNIZABLE_NATS, (variant, backend, row["kld_mean"])
    assert any("both are kept" in text for text in rows["base", "transformers"]["warnings"])


def test_weights_that_lie_there_twice_are_not_copied_along(case: Bench) -> None:
    """Mistral's consolidated.safetensors: the model again under other names. An AWQ with it has 25 bits per weight."""
    from safetensors.torch import load_file, save_file

    write_random(case.model, llama())
    tensors = load_file(case.model / "model.safetensors")
    again = {name.replace("model.", "").replace("_proj", ""): tensor.clone() for name, tensor in tensors.items()}
    save_file(again, case.model / "consolidated.safetensors")
    variants = [{"awq": {"group_size": 64}}, {"gptq": {"group_size": 64}}]
    assert case("run", case.recipe(**MEASURED, variants=variants, backends={"transformers": {}})).returncode == 0
    rows = rows_of(case)
    assert rows["base", "transformers"]["bits_per_weight"] == 32
    # Half of its weights are embedding and head, which stay in 16 bits.
    for variant in ("awq-4bit-g64", "gptq-4bit-g64"):
        assert 8 < rows[variant, "transformers"]["bits_per_weight"] < 12
        assert rows[variant, "transformers"]["kld_mean"] < RECOGNIZABLE_NATS


def test_bits_per_weight_of_a_multimodal_model_are_of_its_text_part(case: Bench) -> None:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(
        vocab_size=768,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        max_position_embeddings=1024,
    )
    sight = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    tokens = {"image_token_index": 700, "boi_token_index": 701, "eoi_token_index": 702}
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4, **tokens)
    write_random(case.model, config, kind=Gemma3ForConditionalGeneration, qk=4.0, embedding=0.25, gemma=True)
    variants = [{"gguf": "Q8_0"}, {"awq": {"group_size": 64}}]
    ran = case("run", case.recipe(**MEASURED, variants=variants, backends={"llamacpp": {}, "transformers": {}}))
    assert ran.returncode == 0, ran.stderr
    rows = rows_of(case)
    assert any("its text model alone, a Gemma3ForCausalLM" in text for text in rows["base", "transformers"]["warnings"])
    assert rows["awq-4bit-g64", "transformers"]["kld_mean"] < RECOGNIZABLE_NATS
    assert rows["base", "transformers"]["bits_per_weight"] == 32
    # Norms stay in 32 bits.
    assert rows["base", "llamacpp"]["bits_per_weight"] == pytest.approx(16, rel=0.01)
    assert rows["gguf-Q8_0", "llamacpp"]["bits_per_weight"] == pytest.approx(8.5, rel=0.01)
    assert rows["gguf-Q8_0", "llamacpp"]["kld_mean"] < 0.02


def test_a_base_on_its_old_grid_says_so_in_every_row_and_wins_nothing_by_it(case: Bench) -> None:
    write_random(case.model, llama())
    assert case("quantize", case.recipe(evaluation=None)).returncode == 0
    (file,) = case.home.glob("artifacts/*/Tiny-Q8_0.gguf")
    parts = {**MEASURED, "calibration": None, "variants": [{"gguf": "Q8_0"}, {"gguf": "Q5_0"}]}
    recipe = case.recipe(**parts, base={"path": str(file)}, backends={"llamacpp": {}, "transformers": {}})
    assert case("run", recipe).returncode == 0
    rows = rows_of(case)
    assert len(rows) == 6
    for row in rows.values():
        assert any("de-quantized from Q8_0: its weights lie on that grid" in text for text in row["warnings"])
    assert rows["gguf-Q8_0", "llamacpp"]["kld_mean"] < 0.1 * rows["gguf-Q5_0", "llamacpp"]["kld_mean"]
    assert "de-quantized from Q8_0" in case("table").stdout
    answer = case("recommend", "--sort", "quality", "--backend", "llamacpp", "--format", "json")
    found = json.loads(answer.stdout)
    assert found["choice"]["variant"] != "gguf-Q8_0"
    (told,) = (each["notes"] for each in found["fitting"] if each["variant"] == "gguf-Q8_0")
    assert "its quality decides nothing: the base was de-quantized from Q8_0" in told[0]
