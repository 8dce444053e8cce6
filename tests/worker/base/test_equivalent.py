"""The exact equivalent: the same function, other weights, and where it is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.worker.base.bases import CONFIG, logits, refusal, run
from workbench.worker.architectures import Sizes
from workbench.worker.base.equivalent import equivalent_factors


@pytest.mark.parametrize("hidden", [48, 64, 96])
def test_equivalent_is_the_same_function(model: Path, tmp_path: Path, hidden: int) -> None:
    reply = run({"path": str(model)}, tmp_path / "out", equivalent={"seed": 5, "hidden": hidden})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["hidden_size"] == hidden and config["intermediate_size"] == 256
    assert config["num_attention_heads"] * 48 == 6 * hidden and config["num_key_value_heads"] * 48 == 3 * hidden
    assert math.isclose(config["rms_norm_eps"], 1e-5 * 48 / hidden)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert reply["dtype"] == "float32" and not (tmp_path / "out" / ".plain").exists()
    before, after = logits(model), logits(reply["path"])
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


def test_equivalent_of_untied_model_with_biases(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    config = {**CONFIG, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    run({"config": config, "init": "random", "seed": 1}, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    torch.manual_seed(0)
    biased = {n: torch.randn_like(t) if n.endswith("bias") else t for n, t in tensors.items()}
    save_file(biased, tmp_path / "in" / "model.safetensors")
    reply = run({"path": str(tmp_path / "in")}, tmp_path / "out", equivalent={"seed": 5, "hidden": 64})
    before, after = logits(tmp_path / "in"), logits(reply["path"])
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


def test_equivalent_leaves_no_weight_of_a_layer_as_it_was(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run({"path": str(model)}, tmp_path / "out", equivalent={"seed": 5, "hidden": 48})
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        kept = after[name][tuple(slice(0, n) for n in tensor.shape)]
        unchanged = float((kept == tensor.float())[tensor != 0].float().mean())
        assert unchanged == 1 if "layers" not in name else unchanged < 0.01, name


def test_equivalent_depends_on_the_seed(model: Path, tmp_path: Path) -> None:
    one = run({"path": str(model)}, tmp_path / "a", equivalent={"seed": 1, "hidden": 64})
    two = run({"path": str(model)}, tmp_path / "b", equivalent={"seed": 2, "hidden": 64})
    again = run({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert one["digest"] != two["digest"] and one["digest"] == again["digest"]
    file = "model.safetensors"
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    sizes = Sizes("llama", hidden=48, layers=1, heads=6, kv_heads=3, head_dim=16, inner=96, vocab_size=9)
    drawn = equivalent_factors(1, 0, sizes)
    assert all(float(f.min()) >= 0.7 and float(f.max()) <= 1.4 for f in drawn.values())
    heads = drawn["value_of_head"].view(3, 2, 16)
    assert (heads[:, 0] == heads[:, 1]).all() and (heads[:, 0] == drawn["value"].view(3, 16)).all()


def test_equivalent_is_refused_where_it_is_not_known(model: Path, tmp_path: Path) -> None:
    said = refusal({"path": str(model)}, tmp_path / "a", equivalent={"seed": 1, "hidden": 56})
    assert "56 does not fit" in said and "256" in said
    assert "does not fit" in refusal({"path": str(model)}, tmp_path / "b", equivalent={"seed": 1, "hidden": 32})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    said = refusal({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert "LlamaForCausalLM only" in said and "Qwen2ForCausalLM" in said


def test_equivalent_refuses_a_config_of_other_sizes(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    said = refusal({"path": str(model)}, tmp_path / "c", equivalent={"seed": 1, "hidden": 64})
    assert "mlp.down_proj" in said and "shape (48, 96)" in said and "(48, 128)" in said
