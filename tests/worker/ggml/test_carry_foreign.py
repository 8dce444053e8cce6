"""A checkpoint that GPTQModel quantized from first to last, carried to GGUF. Its packers in every architecture:
`tests/worker/test_carried_weights.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import write_model, write_tokens
from tests.worker.unpacking import dequantize_gptq
from workbench.machine import isolate
from workbench.worker.ggml import carry

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}


def test_gptq_made_by_gptqmodel(tmp_path: Path) -> None:
    import tokenizers
    import transformers
    from safetensors.torch import load_file

    base = write_model(tmp_path / "base", "llama", **WIDE)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(384)}, unk_token="w0"))
    named = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")
    named.save_pretrained(base)
    request = {
        "base": str(base),
        "tokens": str(write_tokens(tmp_path / "tokens.json", [64] * 8)),
        "method": "gptq",
        "options": {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damping": 0.05},
        "out": str(tmp_path / "other"),
    }
    reply = isolate.call(
        "workbench.worker.methods.gptqmodel:gptqmodel",
        request,
        workdir=tmp_path / "work",
        environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
    )
    assert reply.error is None, reply.log
    for file in (tmp_path / "other").glob("tokenizer*"):
        file.unlink()  # Of words, which llama.cpp's converter does not know.
    source = tmp_path / "other"
    told: Any = carry.carry(
        {"base": "", "source": str(source), "out": f"{source}.gguf", "options": {}}, lambda *_: None
    )
    assert set(told["tensor_types"].values()) - {"F16", "BF16"} == {"Q4_0", "F32"}
    tensors = load_file(source / "model.safetensors")
    file = {each.name: each for each in gguf.GGUFReader(f"{source}.gguf").tensors}
    for layer in range(2):
        # A matrix whose rows stay where they are.
        stem = f"model.layers.{layer}.mlp.down_proj"
        weight = dequantize_gptq({part: tensors[f"{stem}.{part}"] for part in carry.PARTS}, 4)
        stored = file[f"blk.{layer}.ffn_down.weight"]
        assert torch.equal(torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()), weight)
