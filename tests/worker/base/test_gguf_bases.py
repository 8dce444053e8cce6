"""GGUF files of every architecture that is carried: llama.cpp's function on the file, or refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import refusal, run
from tests.worker.base.gguf_files import write_gguf
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.errors import UserError
from workbench.worker.base import gguf_config
from workbench.worker.base.gguf_config import load_gguf, read_gguf
from workbench.worker.ggml.logits import logits_of
from workbench.worker.methods.gguf import convert
from workbench.worker.proof import compare, ids_over

SAME_NATS = 1e-4
DEEP_GELU_NATS = 0.02
"""llama.cpp looks GELU up in 16-bit numbers, of which 46 layers of random weights make 0.005 (transformers with GELU so
rounded agrees with it); with another attention scale than Gemma 2 27B's it is 1.5."""
SHORT, LONG = [1.0 + 0.02 * i for i in range(8)], [1.0 + 3.0 * i for i in range(8)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GLOBAL8 = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-hd": ("llama", {"head_dim": 32}),
    "llama-rope3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {**LOCAL, "rope_type": "linear", "factor": 4.0}}),
    "llama-bias": ("llama", {"attention_bias": True}),
    "mistral-swa": ("mistral", {"sliding_window": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_parameters": {**LOCAL, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2-2b": ("gemma2", {"sliding_window": 32}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 100, "sliding_window": 32}),
    "gemma2-27b": ("gemma2", {"num_hidden_layers": 46, "head_dim": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "query_pre_attn_scalar": 100, "sliding_window": 32}),
    "gemma3-1b": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 32}),
    "gemma3-linear": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_parameters": {"full_attention": GLOBAL8, "sliding_attention": LOCAL}},
    ),
    "gemma3-27b": ("gemma3_text", {"num_hidden_layers": 62, "head_dim": 32, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "phi3-partial": ("phi3", {"sliding_window": None, "rope_parameters": {**LOCAL, "partial_rotary_factor": 0.75}}),
}
"""The cases that were found to become another model, by `small_models.MODELS`' kinds and what differs from them."""


def converted(folder: Path, kind: str, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random model whose attention is far from even, as llama.cpp's converter writes it in float32."""
    from safetensors.torch import load_file, save_file

    pytest.importorskip("sentencepiece")
    base = write_sentencepiece(write_model(folder / "base", kind, **sizes))
    file = base / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if any(part in name for part in ("q_proj.w", "k_proj.w", "qkv_proj.w")):
            tensors[name] = tensors[name] * 4
    save_file(tensors, file, metadata={"format": "pt"})
    out = folder / "Small-F32.gguf"
    monkeypatch.setattr(sys, "argv", [])
    convert({"base": str(base), "out": str(out), "dtype": "float32", "name": "Small"}, lambda *_: None)
    return out


def logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_base_is_llama_cpps_function(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a base and as a variant in transformers; on more tokens than the proof's, past windows and first contexts."""
    import torch
    from transformers import AutoModelForCausalLM

    file = converted(tmp_path, *CASES[name], monkeypatch)
    reply = run({"gguf": str(file)}, tmp_path / "out")
    ids = ids_over(354, 128)
    expected = logits_of(file, ids)
    eager = {"dtype": torch.float32, "attn_implementation": "eager"}
    base = AutoModelForCausalLM.from_pretrained(reply["path"], **eager)
    assert reply["warnings"] == []
    limit = DEEP_GELU_NATS if name == "gemma2-27b" else SAME_NATS
    assert compare(expected, logits(base, ids), limit).same
    assert compare(expected, logits(load_gguf(file, eager), ids), limit).same


@pytest.mark.slow
def test_the_vocabulary_of_a_phi3_base_is_the_given_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter takes no vocabulary of that architecture but a `tokenizer.model`."""
    import gguf

    file = converted(tmp_path, *CASES["phi3-partial"], monkeypatch)
    reply = run({"gguf": str(file)}, tmp_path / "out")
    again = tmp_path / "again.gguf"
    convert({"base": reply["path"], "out": str(again), "dtype": "float32", "name": "Small"}, lambda *_: None)
    first, second = gguf.GGUFReader(file), gguf.GGUFReader(again)
    assert read(first, "tokens") == read(second, "tokens")
    kinds = read(first, "token_type")
    # The converter has its own score for what tokenizer.json calls special.
    plain = [place for place, kind in enumerate(kinds) if kind not in (2, 3, 4)]
    assert len(plain) > 250
    for key in ("token_type", "scores"):
        assert [read(first, key)[place] for place in plain] == [read(second, key)[place] for place in plain], key
    assert compare(logits_of(file, ids_over(354)), logits_of(again, ids_over(354)), 1e-9).same
    # Such a file calls the unknown token a control token; it is a base like the other.
    assert read(second, "token_type")[0] == 3
    run({"gguf": str(again)}, tmp_path / "out2")
    assert pieces(tmp_path / "out2") == pieces(tmp_path / "out") == read(first, "tokens")


@pytest.mark.slow
def test_an_unknown_pre_tokenizer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte-level vocabulary of one's own: llama.cpp's converter knows tokenizers by what they make of one text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = write_model(tmp_path / "base", "llama")
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(["ab abc abcd"], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(base)
    monkeypatch.setattr(sys, "argv", [])
    payload = {"base": str(base), "out": str(tmp_path / "x.gguf"), "dtype": "float32", "name": "Small"}
    with pytest.raises(UserError, match=r"does not know how this base's tokenizer splits text .*Leave out what needs"):
        convert(payload, lambda *_: None)


def pieces(folder: Path) -> list[str]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert model.unk_id() == 0 and model.is_byte(3)
    return [model.id_to_piece(place) for place in range(len(model))]


def read(reader: Any, key: str) -> list[Any]:
    found: list[Any] = reader.get_field(f"tokenizer.ggml.{key}").contents()
    return found


@pytest.mark.slow
def test_experts_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = converted(tmp_path, "mixtral", {}, monkeypatch)
    for asked in (lambda: refusal({"gguf": str(file)}, tmp_path / "out"), lambda: str(refused(file))):
        assert "'llama.expert_count' (4) cannot be carried" in asked()


def refused(file: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_gguf(file, {})
    return caught.value


@pytest.mark.slow
def test_another_model_is_not_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of the reader that no header shows: the rope's scaling is lost."""
    file = converted(tmp_path, *CASES["llama-linear"], monkeypatch)
    monkeypatch.setattr(gguf_config, "_scaling", lambda *_: {})
    assert "transformers makes another model of it than llama.cpp" in refusal({"gguf": str(file)}, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_without_llama_cpp_a_base_is_not_proven_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "x.gguf", "F32")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (warning,) = run({"gguf": str(tmp_path / "x.gguf")}, tmp_path / "out")["warnings"]
    assert warning.startswith("llama-cpp-python is not installed: not proven")


def patched(folder: Path, old: bytes, new: bytes) -> Path:
    """A small GGUF file with one word of its header replaced by another of the same length."""
    assert len(old) == len(new)
    write_gguf(folder / "x.gguf", "F32")
    data = (folder / "x.gguf").read_bytes()
    assert data.count(old) == 1
    (folder / "x.gguf").write_bytes(data.replace(old, new))
    return folder / "x.gguf"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"llama.rope.freq_base", b"llama.rope.freq_bose", "'llama.rope.freq_bose' cannot be carried"),
        (b"llama.rope.freq_base", b"llxma.rope.freq_base", "'llxma.rope.freq_base', which is no key of the arch"),
        (b"llama.block_count", b"llama.block_caunt", "'llama.block_caunt' cannot be carried"),
        (b"tokenizer.ggml.add_bos_token", b"tokenizer.ggml.add_bas_token", "'tokenizer.ggml.add_bas_token' cannot"),
        (b"blk.0.ffn_up.weight", b"blk.0.ffn_uq.weight", "tensor blk.0.ffn_uq.weight has no place"),
        (b"blk.0.attn_v.weight", b"blk.1.attn_v.weight", "block_count' are not those of its tensors"),
        (b"output_norm.weight", b"rope_freqs.weight\0", "has no place"),
    ],
)
def test_what_nobody_reads_is_named(old: bytes, new: bytes, words: str, tmp_path: Path) -> None:
    assert words in str(refused(patched(tmp_path, old, new)))


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not in the file's table either."""
    import gguf

    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda self, name, *a, **k: None if "ffn_up" in name else add(self, name, *a, **k),
    )
    write_gguf(tmp_path / "x.gguf", "F32")
    assert "has no tensor for model.layers.0.mlp.up_proj.weight" in str(refused(tmp_path / "x.gguf"))


def test_a_type_that_nobody_de_quantizes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a file's weights are handed on: to transformers, to vLLM, to a base."""
    import gguf
    import numpy as np

    from workbench.worker.base.gguf_weights import weights_of

    add, kind = gguf.GGUFWriter.add_tensor, gguf.GGMLQuantizationType.Q8_1
    blocks = np.zeros((96, 64 // 32 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda self, name, *a, **k: (
            add(self, name, blocks, raw_dtype=kind) if "ffn_up" in name else add(self, name, *a, **k)
        ),
    )
    path = tmp_path / "x.gguf"
    write_gguf(path, "F32")
    with pytest.raises(UserError, match=r"tensor blk\.0\.ffn_up\.weight is Q8_1, which nobody here de-quantizes"):
        list(weights_of(path, read_gguf(path)))


def test_a_right_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Nothing is carried that was right before: such a base keeps its digest."""
    write_gguf(tmp_path / "x.gguf", "F32")
    assert read_gguf(tmp_path / "x.gguf").carried == []
