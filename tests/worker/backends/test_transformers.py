"""What transformers is asked to be on a GPU, as far as a CPU can show it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.others import pack_as_autoawq
from tests.worker.small_models import pass_request, write_model, write_tokens
from workbench.errors import UserError
from workbench.records import Artifact, Job, Workload
from workbench.worker.backends import transformers as backend
from workbench.worker.calibration import run as calibrate

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def an_engine(path: Path, format: str = "safetensors", **load: Any) -> Any:
    artifact = Artifact(variant="v", method="m", format=format, path=str(path), digest="", disk_bytes=1, parameters=1)
    return backend.Engine(Job("b", artifact, "transformers", {"device": "cpu", "threads": 1}, Workload(**load)))


@pytest.mark.parametrize(("kind", "apart"), [("llama", 354 * 64 * 4), ("llama-tied", 0)])
def test_an_embedding_that_is_not_the_head_is_told_apart(tmp_path: Path, kind: str, apart: int) -> None:
    memory = an_engine(write_model(tmp_path, kind)).memory()
    assert memory["embedding"] == apart < memory["weights"]


def test_capped_scores_are_capped(tmp_path: Path) -> None:
    """Gemma 2's: transformers takes PyTorch's fused attention by itself, which has no cap and says nothing."""
    from transformers import AutoModelForCausalLM

    path = write_model(tmp_path, "gemma2", attn_logit_softcapping=0.5)
    ids = torch.arange(3, 60)[None]

    def said(attention: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention)
        with torch.no_grad():
            return model(ids).logits

    engine = an_engine(path)
    with torch.no_grad():
        ours = engine._model(ids).logits
    assert torch.allclose(ours, said("eager"), atol=1e-5) and not torch.allclose(ours, said("sdpa"), atol=1e-3)
    assert engine.settings()["attention"] == "eager"
    assert "attention" not in an_engine(write_model(tmp_path / "other", "llama")).settings()


def test_experts_that_are_packed_one_by_one_are_told_before_they_are_loaded() -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"

    def refusal(format: str, kind: str) -> str | None:
        return backend.unsupported(Artifact("v", "awq", format, "", "", 1, 1, tensor_types={name: kind}), False)

    assert "experts as one tensor" in str(refusal("awq", "I4-g128")) and refusal("gptq", "I4-row") is not None
    assert refusal("awq", "F16") is refusal("compressed-tensors", "I4-g128") is None


def test_weights_that_no_file_has_are_an_error(tmp_path: Path) -> None:
    """An AWQ checkpoint of experts, which transformers has as one tensor a layer, and one of another shape."""
    from safetensors.torch import load_file, save_file

    sizes = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
    experts = pack_as_autoawq(write_model(tmp_path / "base", "qwen3_moe", **sizes), tmp_path / "X-AWQ", 32)
    with pytest.raises(UserError, match=r"Qwen3MoeForCausalLM finds 6 of its weights not in the files.*experts.0.down"):
        an_engine(experts, "awq")
    dense = write_model(tmp_path / "dense", "llama")
    file = dense / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"LlamaForCausalLM finds 1 of its weights not in the files.*up_proj.weight\. "):
        an_engine(dense)


class Allocator:
    """torch.cuda's counts of what it has given out: here of one number, for there is no GPU."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def take(self, size_bytes: int) -> None:
        self.held += size_bytes
        self.peak = max(self.peak, self.held)

    def max_memory_allocated(self) -> int:
        return self.peak

    max_memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.held


def test_the_workspace_on_a_gpu_is_what_timing_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what loading or scoring took, which may be many times that, and not the cache."""
    engine = an_engine(write_model(tmp_path, "llama"), prompt_tokens=[5], new_tokens=4)
    cuda = Allocator()
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    cuda.take(engine.memory()["weights"])
    for scored in (9000, -9000):
        cuda.take(scored)
    engine._device = "cuda"
    engine.forget_peak()
    engine._device = "cpu"
    cache = 2 * 2 * 2 * 8 * 16 * 4
    for _ in engine.generate([[5, 6, 7, 8, 9]], 4):
        pass
    for timed in (cache, 70, -70):
        cuda.take(timed)
    engine._device = "cuda"
    memory = engine.memory()
    assert memory["kv_cache"] == cache and memory["workspace"] == 70
    assert memory["allocated_peak"] == memory["reserved_peak"] == memory["weights"] + cache + 70


@pytest.fixture(scope="module")
def gemma_awq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An AWQ checkpoint of a small Gemma, whose dtype is bfloat16."""
    folder = tmp_path_factory.mktemp("gemma")
    base, tokens = write_model(folder / "base", "gemma3_text"), write_tokens(folder / "tokens.json", [40] * 12)
    variants = {"awq": ("awq", {"group_size": 32})}
    request = pass_request(base, folder, variants, tokens=tokens, imatrix_out=None, precision="auto")
    calibrate.run(request, lambda *_: None)
    yield folder / "awq"


@pytest.mark.slow
def test_bfloat16_stays_where_a_gpu_is_in_sight(gemma_awq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers casts it to float16 then, whose range Gemma's activations leave."""
    pytest.importorskip("gptqmodel")
    from transformers import AwqConfig
    from transformers.quantizers.quantizer_awq import AwqQuantizer

    assert an_engine(gemma_awq, "awq").settings()["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert AwqQuantizer(AwqConfig()).update_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "kept"),
    [({}, "expandable_segments:False"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1")],
    ids=["ours", "theirs"],
)
def test_every_format_runs_on_the_same_allocator(given: dict[str, str], kept: str) -> None:
    """GPTQModel, imported for AWQ and GPTQ alone, sets another."""
    pytest.importorskip("gptqmodel")
    code = (
        "import os\nfrom workbench.worker.backends import transformers\ntransformers.load_engine()\n"
        "import gptqmodel\nprint('is', os.environ['PYTORCH_ALLOC_CONF'])"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "GPTQMODEL_CPU_WORKERS": "4"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert f"is {kept}\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
            | {"linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    ],
)
def test_models_whose_layers_do_not_all_keep_keys(kind: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    """Linear attention and convolutions carry a state along: timed as any model, and their bytes counted."""
    engine = an_engine(write_model(tmp_path, kind, **sizes), prompt_tokens=[20], new_tokens=4)
    assert [*engine.generate([[5] * 20], 4)] == [[1]] * 4
    keys_and_values = 2 * 2 * 16 * (20 + 3) * 4
    assert keys_and_values < engine.memory()["kv_cache"] < 100 * keys_and_values
