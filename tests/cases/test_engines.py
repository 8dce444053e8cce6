"""Models of the kinds that became another model, or ended a run in other people's words, from recipe to table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cases.models import MEASURED, SIZES, configure, llama, rows_of, write_random
from tests.worker.base.bases import refusal
from workbench.worker.methods.grouped import group_sizes

EAGER = {"enforce_eager": True}
SAME_NATS = 0.02
"""Of a variant in 8 bits, which leaves 0.003 to 0.006 of these models; another function is 0.19 and more."""
PLAIN: dict[str, Any] = {"transformers": {}, "llamacpp": {}}


def run(case: Bench, variants: list[Any], backends: dict[str, Any], *codes: int, **more: Any) -> str:
    """Its output; `codes`: the exit codes that it may have."""
    answer = case("run", case.recipe(**{**MEASURED, **more}, variants=variants, backends=backends))
    assert answer.returncode in codes and "Traceback" not in answer.stderr, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def errors(case: Bench) -> dict[tuple[str, str], str]:
    """Variant and engine -> the error of its row."""
    return {(row["artifact"]["variant"], row["backend"]): row["error"] for row in case.rows() if row["error"]}


def divergences(case: Bench) -> dict[tuple[str, str], float]:
    """Nats a token from the base, of what was measured."""
    return {pair: row["kld_mean"] for pair, row in rows_of(case).items() if row["kld_mean"] is not None}


@pytest.mark.slow
def test_a_tokenizer_that_the_converter_does_not_know(case: Bench) -> None:
    """What needs no GGUF file goes on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    write_random(case.model, llama(vocab_size=512, bos_token_id=0, eos_token_id=0))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (case.model / name).unlink()
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[end])
    own.train_from_iterator(["ab abc abcd"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token=end).save_pretrained(case.model)
    run(case, [{"gguf": "Q8_0"}, {"awq": {"group_size": 64}}], PLAIN, 1)
    assert divergences(case).keys() == {("base", "transformers"), ("awq-4bit-g64", "transformers")}
    found = errors(case)
    assert found.keys() == {("base", "llamacpp"), ("gguf-Q8_0", "transformers"), ("gguf-Q8_0", "llamacpp")}
    for said in found.values():
        assert "does not know how this base's tokenizer splits text (its pre-tokenizer). Leave out what" in said
        assert "\n" not in said and "NotImplementedError" not in said


@pytest.mark.slow
def test_a_rope_of_llama_3_in_a_gguf_file(case: Bench) -> None:
    """transformers' own reader leaves the scaling out."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write_random(case.model, llama(rope_parameters=rope), qk=6.0)
    run(case, [{"gguf": "Q8_0"}], PLAIN, 0)
    found = divergences(case)
    assert len(found) == 4 and max(found.values()) < SAME_NATS, found


@pytest.mark.slow
def test_float64_is_measured_in_float32_and_said(case: Bench) -> None:
    from safetensors.torch import load_file, save_file

    write_random(case.model, llama())
    file = case.model / "model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    configure(case.model / "config.json", dtype="float64")
    told = run(case, [{"gguf": "Q8_0"}, {"awq": {"group_size": 64}}], PLAIN, 0)
    found = divergences(case)
    assert len(found) == 6 and max(nats for (variant, _), nats in found.items() if "awq" not in variant) < SAME_NATS
    assert "weights are float64, which no engine computes in: made and measured in float32" in " ".join(told.split())


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return write_random(folder, MixtralConfig(**{**SIZES, **experts}))


@pytest.mark.slow
def test_experts_are_measured_or_refused_by_name(case: Bench) -> None:
    mixtral(case.model)
    variants = [{"gguf": "Q8_0"}, {"gguf": {"type": "Q4_K_M", "imatrix": True}}, {"awq": {"group_size": 64}}]
    run(case, variants, PLAIN, 1)
    found = divergences(case)
    assert found.pop(("gguf-Q4_K_M-imatrix", "llamacpp")) < 5 * SAME_NATS
    assert found.keys() == {("base", "transformers"), ("base", "llamacpp"), ("gguf-Q8_0", "llamacpp")}
    assert max(found.values()) < SAME_NATS
    said = errors(case)
    assert said.keys() == {("gguf-Q8_0", "transformers"), ("gguf-Q4_K_M-imatrix", "transformers")}
    assert all("its 'llama.expert_count' (4) cannot be carried into" in error for error in said.values())
    awq = rows_of(case)["awq-4bit-g64", "transformers"]["unsupported"]
    assert "has a layer's experts as one tensor, and would draw at random what is packed one by one" in awq


@pytest.mark.slow
def test_experts_in_a_gguf_file_are_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They call themselves `llama`, and would become one with a random MLP."""
    from workbench.worker.methods.gguf import convert

    monkeypatch.setattr(sys, "argv", [])
    file = tmp_path / "Mix-F32.gguf"
    payload = {"base": str(mixtral(tmp_path / "base")), "out": str(file), "dtype": "float32", "name": "Mix"}
    convert(payload, lambda *_: None)
    assert "its 'llama.expert_count' (4) cannot be carried" in refusal({"gguf": str(file)}, tmp_path / "out")


@pytest.mark.slow
def test_a_phi3_gguf_file_as_base(case: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter takes Phi-3's vocabulary from a `tokenizer.model` alone, which no GGUF file comes with."""
    from transformers import Phi3Config

    from workbench.worker.methods.gguf import convert

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    config = Phi3Config(**{**SIZES, "pad_token_id": 0, "sliding_window": None, "rope_parameters": rope})
    monkeypatch.setattr(sys, "argv", [])
    file = case.folder / "Phi-F32.gguf"
    payload = {
        "base": str(write_random(case.model, config, qk=8.0)),
        "out": str(file),
        "dtype": "float32",
        "name": "Phi",
    }
    convert(payload, lambda *_: None)
    backends = {"transformers": {"variants": ["base"]}, "llamacpp": {}}
    run(case, [{"gguf": "Q8_0"}], backends, 0, base={"path": str(file)})
    found = divergences(case)
    assert len(found) == 3 and max(found.values()) < SAME_NATS, found


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(value: float, case: Bench) -> None:
    """Nothing of it is measured."""
    from safetensors.torch import load_file, save_file

    write_random(case.model, llama())
    file = case.model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    told = run(case, [{"gguf": "Q8_0"}, {"gptq": {"group_size": 64}}], PLAIN, 2)
    assert "model.layers.1.mlp.down_proj.weight has NaN or infinite weights" in told and not case.rows()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_sizes_under_other_names(kind: str, case: Bench) -> None:
    """GPT-2 says `n_head`, Bloom too, and Bloom's code in transformers has no sdpa."""
    from transformers import CONFIG_MAPPING

    named: dict[str, Any] = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "bos_token_id", "eos_token_id")}
    write_random(case.model, CONFIG_MAPPING[kind](**named, num_hidden_layers=2, num_attention_heads=4))
    engines = {"transformers": {"variants": ["base"]}, "vllm": {**EAGER, "variants": ["base"]}}
    run(case, [{"gguf": "Q8_0"}], engines, 0, 1)
    found = divergences(case)
    assert found.keys() == {("base", name) for name in engines} and max(found.values()) < SAME_NATS, errors(case)


@pytest.mark.slow
def test_group_sizes_that_are_advised_load(case: Bench) -> None:
    """Where a group size divides nothing, the line names others: those that each kernel takes."""
    write_random(case.model, llama())
    sizes = group_sizes([128, 256])
    variants = [{method: {"group_size": size}} for method in ("awq", "gptq") for size in sizes]
    run(case, variants, {"transformers": {"variants": ["awq-*", "gptq-*"]}}, 0, evaluation=None)
    assert len(case.measured()) == 2 * len(sizes) == 6
