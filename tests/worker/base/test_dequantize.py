"""GGUF files: the same model as transformers reads, nothing lost on the way, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import logits, refusal, run
from tests.worker.base.gguf_files import write_gguf
from workbench.worker.base.gguf_config import llama3_divisors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "half_norms", "dtype"),
    [("Q8_0", True, "float32"), ("F16", True, "float16"), ("F16", False, "float32"), ("F32", False, "float32")],
)
def test_gguf_becomes_the_same_model(tmp_path: Path, kind: str, half_norms: bool, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / f"tiny-{kind}.gguf"
    write_gguf(file, kind, half_norms=half_norms)
    reply = run({"gguf": str(file)}, tmp_path / "out")
    assert (reply["dtype"], reply["license"], reply["context_length"]) == (dtype, "mit", 128)
    assert reply["quantized_types"] == (["Q8_0"] if kind == "Q8_0" else [])
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        expected = read(torch.arange(3, 99)[None]).logits[0].double()
    assert torch.equal(logits(reply["path"]), expected)
    tokenizer = AutoTokenizer.from_pretrained(reply["path"])
    assert tokenizer("a")["input_ids"][0] == 0, "the file says that BOS is added"
    assert "model_name: tiny\n" in (tmp_path / "out" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 20000.0 and "quantization_config" not in config


def llama3_scaling() -> tuple[dict[str, Any], Any]:
    """Llama 3's divisors as transformers computes them, an implementation that is not ours."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=131072)
    config.rope_parameters = {**scaling, "rope_theta": 20000.0}
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    import torch

    return scaling, 20000.0 ** (-torch.arange(0, 16, 2).double() / 16) / frequencies.double()


def test_llama3_divisors_are_those_of_transformers() -> None:
    import numpy as np

    scaling, divisors = llama3_scaling()
    assert divisors.max() > 7.9 and divisors.min() < 1.01
    np.testing.assert_allclose(llama3_divisors(20000.0, 16, scaling), divisors.numpy(), rtol=1e-5)


@pytest.mark.slow
def test_gguf_rope_scaling_is_not_lost(tmp_path: Path) -> None:
    scaling, divisors = llama3_scaling()
    write_gguf(tmp_path / "x.gguf", divisors=divisors.numpy())
    run({"path": str(tmp_path / "x.gguf")}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: config["rope_parameters"][k] for k in scaling} == scaling
    assert {k: config["rope_scaling"][k] for k in scaling} == scaling
    write_gguf(tmp_path / "y.gguf", divisors=divisors.numpy() ** 0.5 + 1)
    assert "rope scaling cannot be carried" in refusal({"path": str(tmp_path / "y.gguf")}, tmp_path / "out2")


def test_truncated_gguf_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    for kept in (len(whole) - 2000, len(whole) // 2, 3000, 200, 20, 5):
        file.write_bytes(whole[:kept])
        said = refusal({"path": str(file)}, tmp_path / "o")
        assert "x.gguf is truncated or damaged" in said, said
    file.write_bytes(b"PK\x03\x04 something else")
    assert "not a GGUF file" in refusal({"path": str(file)}, tmp_path / "o")


def test_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", architecture="nonesuch")
    assert "architecture 'nonesuch'" in refusal({"path": str(tmp_path / "x.gguf")}, tmp_path / "o")
