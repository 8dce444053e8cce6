"""Checkpoints by another packer, GPTQModel's, carried to GGUF: what `carry` proves, and each weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import write_model, write_tokens
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from workbench.machine import isolate
from workbench.worker.ggml import carry

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}


def check(source: Path, kind: str) -> None:
    """Carry it, and compare a matrix whose rows stay where they are."""
    from safetensors.torch import load_file

    request = {"base": "", "source": str(source), "out": f"{source}.gguf", "options": {}}
    told: Any = carry.carry(request, lambda *_: None)
    assert set(told["tensor_types"].values()) - {"F16", "BF16"} == {kind, "F32"}
    tensors = load_file(source / "model.safetensors")
    file = {each.name: each for each in gguf.GGUFReader(f"{source}.gguf").tensors}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.down_proj"
        parts = {part: tensors[f"{stem}.{part}"] for part in carry.PARTS if f"{stem}.{part}" in tensors}
        weight = dequantize_gptq(parts, 4) if "g_idx" in parts else dequantize_awq(parts)
        stored = file[f"blk.{layer}.ffn_down.weight"]
        written = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        assert float((written - weight).abs().max() / weight.abs().max()) <= (5e-4 if kind == "Q4_1" else 0.0)


def test_gptq_made_by_gptqmodel(tmp_path: Path) -> None:
    import tokenizers
    import transformers

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
    check(tmp_path / "other", "Q4_0")


def test_awq_packed_by_gptqmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In AutoAWQ's layout. To find its scales GPTQModel wants a GPU, so they are of each group's extremes here."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(write_model(tmp_path / "base", "llama", **WIDE), tmp_path / "other"))
    tensors = {name: tensor.half() for name, tensor in load_file(source / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        groups = tensors.pop(name).float().unflatten(1, (-1, 32))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round()
        codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15)
        weight = ((codes - zeros[:, :, None]) * scales[:, :, None]).flatten(1)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layer = AwqTorchLinear(4, 32, False, False, weight.shape[1], weight.shape[0], pack_dtype=torch.int32)
        layer.pack(linear, scales, zeros)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": getattr(layer, part).contiguous() for part in ("qweight", "qzeros", "scales")}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    own = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float16", "quantization_config": own}))
    check(source, "Q4_1")
