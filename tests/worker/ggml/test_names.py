"""Tensor names of GGUF files by the `gguf` package's own map, and what has none."""

from __future__ import annotations

import pytest

from workbench.errors import UserError
from workbench.worker.ggml.names import tensor_names

pytest.importorskip("conversion")

NAMES = [f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "CohereForCausalLM"])
def test_names_by_the_packages_map(kind: str) -> None:
    found = tensor_names({"architectures": [kind], "num_hidden_layers": 2}, NAMES)
    assert found == dict(zip(NAMES, [f"blk.1.{w}.weight" for w in ("attn_q", "attn_output", "ffn_down")], strict=True))


def test_what_the_converter_or_the_map_does_not_know() -> None:
    config = {"architectures": ["HeliumForCausalLM"], "num_hidden_layers": 2}
    with pytest.raises(UserError, match=r"does not know HeliumForCausalLM.*leave out what needs one"):
        tensor_names(config, NAMES)
    with pytest.raises(UserError, match=r"no name for model\.layers\.0\.odd\.weight.*leave `imatrix` out"):
        tensor_names(config | {"architectures": ["LlamaForCausalLM"]}, ["model.layers.0.odd.weight"])
