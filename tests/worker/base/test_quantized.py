"""Bases that others quantized, de-quantized without loss: each equal to what its own reader says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import refusal, run
from tests.worker.others import configure, pack_as_autoawq
from tests.worker.small_models import pass_request
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from tests.worker.written import read_compressed, write_compressed
from workbench.worker.base import headers
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration.weights import open_weights, read_layer

torch = pytest.importorskip("torch")

GPTQ: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 32},
    "rows": {"group_size": -1, "bits": 8},
    "zeros": {"group_size": 32, "sym": False, "bits": 3},
    "act-order": {"group_size": 32, "desc_act": True},
}


def loaded(folder: str | Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def prepared(folder: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `prepare` says and the tensors it wrote; a plan knows their shapes."""
    made = run({"path": str(folder)}, out)
    tensors = loaded(made["path"])
    planned = headers.read({"source": {"path": str(folder)}}, lambda *_: None)
    assert planned["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert planned["dtype"] == made["dtype"] == str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    assert "quantization_config" not in json.loads((Path(made["path"]) / "config.json").read_text())
    return made, tensors


def stems(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of each packed matrix."""
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {
        stem: {key.removeprefix(f"{stem}."): t for key, t in tensors.items() if key.startswith(f"{stem}.")}
        for stem in names
    }


def test_awq(tiny_llama: Path, tmp_path: Path) -> None:
    packed = pack_as_autoawq(tiny_llama, tmp_path / "X-AWQ", 32)
    made, tensors = prepared(packed, tmp_path / "o")
    before = loaded(packed)
    for stem, parts in stems(before).items():
        assert torch.equal(tensors[f"{stem}.weight"], dequantize_awq(parts))
    assert torch.equal(tensors["model.embed_tokens.weight"], before["model.embed_tokens.weight"].float())
    assert made["quantized_types"] == ["I4-g32"]
    assert made["warnings"] == ["its weights are awq (I4-g32): made and measured as what the codes mean, in float32"]


@pytest.fixture(scope="module")
def gptq(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    variants = {name: ("gptq", options) for name, options in GPTQ.items()}
    request = pass_request(tiny_llama, folder, variants, imatrix_out=None, precision="auto")
    answer: Any = calibrate.run(request, lambda *_: None)
    assert answer["refused"] == {}
    return folder


@pytest.mark.parametrize("name", GPTQ)
def test_gptq(name: str, gptq: Path, tmp_path: Path) -> None:
    _, tensors = prepared(gptq / name, tmp_path / "o")
    for stem, parts in stems(loaded(gptq / name)).items():
        assert torch.equal(tensors[f"{stem}.weight"], dequantize_gptq(parts, GPTQ[name].get("bits", 4)))


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8"])
def test_compressed_tensors(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    theirs = write_compressed(tiny_llama, tmp_path / "X", scheme)
    made, tensors = prepared(theirs, tmp_path / "o")
    for name, weight in read_compressed(theirs).items():
        assert torch.equal(tensors[name], weight)
    assert made["quantized_types"] == ["int8" if scheme == "W8A8" else "int4-g32"]


def test_mxfp4(tmp_path: Path) -> None:
    """gpt-oss's experts, as transformers' own function has them."""
    import transformers
    from safetensors.torch import save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    more = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 96}
    config = transformers.GptOssConfig(**sizes, **more, layer_types=["full_attention"], pad_token_id=0)
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    tensors, expected = loaded(base), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    configure(base, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    made, after = prepared(base, tmp_path / "o")
    assert len(expected) == 2 and made["dtype"] == "bfloat16" and made["quantized_types"] == ["MXFP4"]
    for name, weight in expected.items():
        assert torch.equal(after[name], weight) and float(weight.abs().max()) > 0
    # [in, gate and up in turn] as the calibration pass has it, an expert after another.
    layer = read_layer(open_weights(Path(made["path"])), 0, torch.device("cpu"))
    pair = expected["model.layers.0.mlp.experts.gate_up_proj"][2].float()
    assert torch.equal(layer["mlp.experts.2.up_proj.weight"], pair[:, 1::2].t())
    assert torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])


def test_what_is_not_read_or_not_whole(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    packed = pack_as_autoawq(tiny_llama, tmp_path / "X-AWQ", 32)
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    configure(packed, quantization_config=said | {"version": "gemv"})
    assert "is packed as awq (gemv): what is read here" in refusal({"path": str(packed)}, tmp_path / "o")
    configure(packed, quantization_config=said)
    tensors = loaded(packed)
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    assert "tensor model.layers.0.mlp.up_proj.scales is missing" in refusal({"path": str(packed)}, tmp_path / "o")
    plain = Path(shutil.copytree(tiny_llama, tmp_path / "plain"))
    configure(plain, quantization_config={"quant_method": "awq"})
    assert "already quantized (awq)" in refusal({"path": str(plain)}, tmp_path / "o")
