"""GGUF files: the same model as transformers reads, nothing lost on the way, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import logits, refusal, run
from workbench.worker.base.gguf_config import llama3_divisors


def write_gguf(
    path: Path, quantized: str = "Q8_0", divisors: Any = None, architecture: str = "llama", half_norms: bool = True
) -> None:
    """A llama GGUF of random weights with a byte-level tokenizer."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    rng = np.random.default_rng(0)
    hidden, heads, kv_heads, head_dim, mlp, vocab = 64, 4, 2, 16, 96, 259
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * 257])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    kind = gguf.GGMLQuantizationType[quantized]
    shapes = {
        "token_embd": (vocab, hidden),
        "blk.0.attn_q": (heads * head_dim, hidden),
        "blk.0.attn_k": (kv_heads * head_dim, hidden),
        "blk.0.attn_v": (kv_heads * head_dim, hidden),
        "blk.0.attn_output": (hidden, heads * head_dim),
        "blk.0.ffn_gate": (mlp, hidden),
        "blk.0.ffn_up": (mlp, hidden),
        "blk.0.ffn_down": (hidden, mlp),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
        "output_norm": (hidden,),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32) * 0.2 + (len(shape) == 1)
        if len(shape) == 1:
            if half_norms:
                values = values.astype(np.float16).astype(np.float32)
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
