"""The table of architectures: what it refuses, and that each entry's folds leave the model's function alone."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.worker.architectures import ARCHITECTURES, describe

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def test_unknown_architecture_names_the_way_out() -> None:
    with pytest.raises(UserError, match="(?s)'lama'.*Did you mean 'llama'.*engine: gptqmodel"):
        describe(LLAMA | {"model_type": "lama"})


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="experts are not supported yet.*engine: gptqmodel"):
        describe(LLAMA | {"model_type": "mixtral"})


def test_multimodal_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="only text models"):
        describe({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_entry_is_whole(kind: str) -> None:
    architecture = describe(LLAMA | {"model_type": kind})
    assert architecture.model_type == kind
    assert set(architecture.gguf) == set(architecture.linears)
    assert len(set(architecture.gguf.values())) == len(architecture.linears)
    for group in architecture.groups:
        if group.feeder.kind == "linear":
            assert group.feeder.module in architecture.linears
        else:
            assert group.feeder.module not in architecture.linears


def test_phi3_values_and_up_rows_are_the_last_ones() -> None:
    by_linear = {group.linears[0]: group.feeder for group in describe(LLAMA | {"model_type": "phi3"}).groups}
    assert by_linear["self_attn.o_proj"].rows == (64 + 32, 64 + 32 + 32)
    assert by_linear["self_attn.o_proj"].repeats == 2
    assert by_linear["mlp.down_proj"].rows == (128, 256)
