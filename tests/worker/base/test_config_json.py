"""What a configuration may say, and under which names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import CONFIG
from workbench.errors import UserError
from workbench.worker.architectures import sizes_of
from workbench.worker.base.config_json import check_config, context_tokens
from workbench.worker.base.whole import check_names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0, not a whole number from 1 to 2048"),
        ({"max_position_embeddings": -5}, "`max_position_embeddings` is -5"),
        ({"num_hidden_layers": [2, 2]}, "`num_hidden_layers` is [2, 2]"),
        ({"sliding_window": 0}, "`sliding_window` is 0"),
        ({"vocab_size": True}, "`vocab_size` is True"),
        ({"n_layer": 10**9}, "`n_layer` is 1000000000"),
        ({"num_key_value_heads": 4}, "`num_key_value_heads` is 4, not a divisor of its 6 attention heads"),
        ({"rms_norm_eps": float("inf")}, "`rms_norm_eps` is inf, not a number above 0, up to 0.1"),
        ({"layer_norm_epsilon": 0}, "`layer_norm_epsilon` is 0"),
        ({"rope_theta": True}, "`rope_theta` is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "`factor` is -1"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "`rope_theta` is 0"),
        ({"rope_scaling": 5}, "`rope_scaling` is 5, not an object"),
        ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` is 'false', not true or false"),
    ],
)
def test_entries_that_no_model_has(changes: dict[str, Any], said: str) -> None:
    check_config(CONFIG, "here")
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        check_config(config, "here")
    assert f"here: {said}" in str(caught.value)


def test_a_wrapper_s_language_model_is_what_counts() -> None:
    check_config({"text_config": CONFIG}, "here")
    with pytest.raises(UserError):
        check_config({"text_config": {**CONFIG, "hidden_size": 0}}, "here")


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt", "mpt", "gptj"])
def test_sizes_by_the_names_that_other_architectures_have(kind: str) -> None:
    """As transformers' own class of each maps them."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](num_hidden_layers=3, num_attention_heads=4, hidden_size=24, vocab_size=99)
    check_config(config.to_dict(), "here")
    sizes = sizes_of(config.to_dict())
    assert (sizes.layers, sizes.heads, sizes.hidden, sizes.vocab_size) == (3, 4, 24, 99)
    assert sizes.kv_heads == 4 and sizes.head_dim == 6
    context = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", 0))
    assert context_tokens(config.to_dict()) == context


@pytest.mark.slow
def test_what_every_class_of_transformers_is_by_default() -> None:
    """Nothing that a model of theirs can have is refused."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    tried = 0
    for kind in {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}:
        try:
            settings = CONFIG_MAPPING[kind]()
        except Exception:  # some have no defaults, some need a library that is not here
            continue
        config = json.loads(json.dumps(settings.to_dict(), default=str))
        check_config(config, kind)
        check_names(Path(kind), config, settings)
        tried += 1
    assert tried > 100
