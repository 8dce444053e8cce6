"""Weights of types that engines do not take, as plain floats: the same numbers, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import refusal, run
from workbench.worker.base import headers


def rewrite(model: Path, tensors: dict[str, Any], **changes: Any) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def loaded(path: str | Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(Path(path) / "model.safetensors")


def test_float64_is_made_in_float32_and_said(model: Path, tmp_path: Path) -> None:
    before = loaded(model)
    rewrite(model, {name: tensor.double() for name, tensor in before.items()}, dtype="float64", torch_dtype="float64")
    (model / "pytorch_model.bin").write_bytes(b"x")
    made = run({"path": str(model)}, tmp_path / "o")
    assert (made["dtype"], made["weight_bytes"]) == ("float32", 4 * made["parameters"])
    assert made["warnings"] == ["its weights are float64, which no engine computes in: made and measured in float32"]
    after = loaded(made["path"])
    assert after.keys() == before.keys() and all(bool((after[name] == before[name]).all()) for name in before)
    config = json.loads((Path(made["path"]) / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    names = {path.name for path in Path(made["path"]).iterdir()}
    assert "tokenizer.json" in names and "pytorch_model.bin" not in names
    assert headers.read({"source": {"path": str(model)}}, lambda *_: None)["dtype"] == "float32"


@pytest.mark.parametrize("kind", ["blocks", "rows", "tensor"])
def test_fp8_with_scales_is_multiplied_out(model: Path, tmp_path: Path, kind: str) -> None:
    """Blocks as DeepSeek writes them (the last of a side may be smaller), a scale a row or a tensor as others do."""
    import torch

    before, stored, expected = loaded(model), {}, {}
    chance = torch.Generator().manual_seed(0)
    for name, tensor in before.items():
        expected[name] = stored[name] = tensor.bfloat16()
        if "proj" in name:
            rows, columns = tensor.shape
            shape = {"blocks": (-(-rows // 32), -(-columns // 40)), "rows": (rows, 1), "tensor": (1,)}[kind]
            scale = torch.rand(shape, generator=chance) + 0.5
            stored[name] = tensor.to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv" if kind == "blocks" else f"{name}_scale"] = scale
            each = torch.tensor(
                [[float(scale[r // 32, c // 40]) for c in range(columns)] for r in range(rows)]
                if kind == "blocks"
                else scale.tolist()
            )
            expected[name] = (stored[name].float() * each).bfloat16()
    method = {"quant_method": "fp8", **({"weight_block_size": [32, 40]} if kind == "blocks" else {})}
    rewrite(model, stored, quantization_config=method, dtype="bfloat16")
    made = run({"path": str(model)}, tmp_path / "o")
    after = loaded(made["path"])
    assert after.keys() == before.keys() and made["dtype"] == "bfloat16"
    assert all(bool((after[name] == expected[name]).all()) for name in after)
    assert "quantization_config" not in json.loads((Path(made["path"]) / "config.json").read_text())
    assert made["warnings"] == ["its weights are FP8 with scales: made and measured multiplied out, in bfloat16"]
    assert made["quantized_types"] == ["F8_E4M3"]
    read = headers.read({"source": {"path": str(model)}}, lambda *_: None)
    assert read["dtype"] == "bfloat16" and read["tensors"].keys() == before.keys()


def test_fp8_whose_scales_do_not_fit(model: Path, tmp_path: Path) -> None:
    import torch

    name = "model.layers.0.mlp.up_proj.weight"
    stored = {**loaded(model), f"{name}_scale_inv": torch.ones(7, 7)}
    stored[name] = stored[name].to(torch.float8_e4m3fn)
    rewrite(model, stored, quantization_config={"quant_method": "fp8"})
    assert f"{name}_scale_inv has 7 scales for" in refusal({"path": str(model)}, tmp_path / "o")


def test_a_float64_head_of_its_own_stays(model: Path, tmp_path: Path) -> None:
    """What is written anew and what is left out are one folder."""
    import torch

    before = {name: tensor.double() for name, tensor in loaded(model).items()}
    own = torch.flip(before["model.embed_tokens.weight"], [0])
    rewrite(model, {**before, "lm_head.weight": own}, tie_word_embeddings=True)
    made = run({"path": str(model)}, tmp_path / "o")
    assert len(made["warnings"]) == 2 and bool((loaded(made["path"])["lm_head.weight"] == own).all())
    assert not (Path(made["path"]) / "model.safetensors").is_symlink()
