"""Model directories: what their headers say, and every way one can be bad."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.worker.base.bases import refusal, run
from workbench.worker.base.checkpoint import StoredTensor, parameters_of, read_header


def test_read_header_gives_what_the_file_holds(base_dir: Path) -> None:
    from safetensors.torch import load_file

    header = read_header(base_dir / "model.safetensors")
    for name, tensor in load_file(base_dir / "model.safetensors").items():
        assert header[name].shape == tuple(tensor.shape)
        assert header[name].size_bytes == tensor.numel() * tensor.element_size()
    assert dataclasses.is_dataclass(next(iter(header.values())))


def test_tied_output_matrix_counts_once(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    once = run({"path": str(model)}, tmp_path / "a")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    twice = run({"path": str(model)}, tmp_path / "b")
    assert twice["parameters"] == once["parameters"] and twice["weight_bytes"] == once["weight_bytes"]


def test_of_a_multimodal_model_what_reads_text_counts() -> None:
    """Names as transformers 4 and 5 have saved them."""
    names = ["language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.embed_tokens.weight"]
    others = ["vision_tower.vision_model.head.weight", "model.visual.patch_embed.weight"]
    others += ["multi_modal_projector.mm_input_projection_weight", "model.audio_tower.layers.0.fc1.weight"]
    tensors = {name: StoredTensor(Path(), "F32", (2, 2), 16) for name in names + others}
    assert set(parameters_of({"text_config": {"vocab_size": 8}}, tensors)) == set(names)
    assert set(parameters_of({"vocab_size": 8}, tensors)) == set(names + others)


def test_license_of_the_model_card(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# x\nlicense: gpl\n")
    assert run({"path": str(model)}, tmp_path / "a")["license"] == "mit"
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n")
    assert run({"path": str(model)}, tmp_path / "b")["license"] == "llama3.1"


def test_incomplete_directories(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    (model / "model.safetensors").rename(model / "part.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "part.safetensors", "b": "gone.safetensors"}})
    )
    assert "1 of 2 shards are missing (gone.safetensors)" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert "no shard holds (a, ...)" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../part.safetensors"}}))
    assert "missing" in refusal({"path": str(model)}, out)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {')
    assert "not valid JSON" in refusal({"path": str(model)}, out)
    (model / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal({"path": str(model)}, out)
    (model / "config.json").unlink()
    assert "no config.json" in refusal({"path": str(model)}, out)
    (model / "x.Q4_0.gguf").write_bytes(b"GGUF")
    assert "x.Q4_0.gguf" in refusal({"path": str(model)}, out)


def test_a_configuration_larger_than_any_is_not_read(model: Path, tmp_path: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(1 << 40)  # of holes
    assert "config.json is not valid JSON (it is larger than any" in refusal({"path": str(model)}, tmp_path / "o")


def test_truncated_shard_is_named(model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:kept])
        said = refusal({"path": str(model)}, tmp_path / "o")
        assert "model.safetensors" in said and ("truncated" in said or "not a whole" in said), said
    file.write_bytes(whole + b"x")
    assert "longer than its header" in refusal({"path": str(model)}, tmp_path / "o")
    file.write_bytes((20).to_bytes(8, "little") + b"x" * 40)
    assert "header cannot be read" in refusal({"path": str(model)}, tmp_path / "o")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    assert "incomplete" in refusal({"path": str(model)}, tmp_path / "o")
    (model / name).write_bytes(b"\x80\x04cos\nsystem\n")
    said = refusal({"path": str(model)}, tmp_path / "o")
    assert "safetensors and GGUF only" in said and name in said
    assert "safetensors and GGUF only" in refusal({"path": str(model / name)}, tmp_path / "o")


def test_pickles_beside_safetensors_do_no_harm(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "consolidated.safetensors").write_bytes(b"x")
    assert run({"path": str(model)}, tmp_path / "o")["parameters"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_remote_code_is_off_unless_allowed(model: Path, tmp_path: Path, name: str) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "x.Y"}}))
    said = refusal({"path": str(model)}, tmp_path / "o")
    assert name in said and "trust_remote_code: true" in said
    assert run({"path": str(model)}, tmp_path / "o", allow_remote_code=True)["parameters"]


def test_configs_of_something_else(model: Path, tmp_path: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    for change, said in (
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
        ({"architectures": []}, "no `architectures`"),
        ({"vocab_size": None, "text_config": {}}, "no `vocab_size`"),
    ):
        changed = {k: v for k, v in {**content, **change}.items() if v is not None}
        (model / "config.json").write_text(json.dumps(changed))
        assert said in refusal({"path": str(model)}, tmp_path / "o")
