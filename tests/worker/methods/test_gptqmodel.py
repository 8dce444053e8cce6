"""`engine: gptqmodel` really runs GPTQModel, and its checkpoint is one that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workbench.machine import isolate


def make(tmp_path: Path, method: str, options: dict[str, Any]) -> isolate.Reply:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    words = {f"w{i}": i for i in range(256)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w1",
        eos_token="w2",
    ).save_pretrained(base)
    windows = torch.randint(3, 256, (8, 64)).tolist()
    (tmp_path / "tokens.json").write_text(json.dumps({"windows": windows}))
    payload = {
        "base": str(base),
        "tokens": str(tmp_path / "tokens.json"),
        "method": method,
        "options": options,
        "out": str(tmp_path / "out"),
        "allow_remote_code": False,
    }
    return isolate.call(
        "workbench.worker.methods.gptqmodel:gptqmodel",
        payload,
        workdir=tmp_path / "work",
        environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
def test_gptq_by_gptqmodel(tmp_path: Path) -> None:
    options = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "damping": 0.05}
    reply = make(tmp_path, "gptq", options)
    assert reply.error is None, reply.log
    assert reply.value["tensor_types"]["model.layers.0.self_attn.q_proj.weight"] == "I4-g128"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "gptq"


@pytest.mark.slow
def test_what_gptqmodel_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    reply = make(tmp_path, "gptq", {"bits": 9, "group_size": 128, "sym": True, "desc_act": False, "damping": 0.05})
    assert reply.user_error and "GPTQModel did not make this gptq variant" in (reply.error or "")
