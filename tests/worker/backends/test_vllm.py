"""What the program asks of vLLM, by vLLM's own rules, and what its worker says of itself; on vLLM's CPU build."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.small_models import write_model, write_tokens
from tests.worker.written import write_compressed
from workbench.machine import isolate
from workbench.records import Artifact, Job, Workload, from_json, to_json
from workbench.worker.backends import vllm as backend
from workbench.worker.backends import vllm_cache, vllm_inside
from workbench.worker.calibration import run as calibrate

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
PROMPT, NEW = 40, 8
SCHEMES = ("W4A16_ASYM", "W8A8", "FP8_DYNAMIC")


def a_job(path: Path, **options: Any) -> Job:
    artifact = Artifact("v", "base", "safetensors", str(path), "", 1, 100_000)
    load = Workload(prompt_tokens=[PROMPT], new_tokens=NEW, batches=[2])
    return Job("b", artifact, "vllm", {"enforce_eager": True, "threads": 1} | options, load)


@pytest.mark.slow
def test_a_gpu_that_is_partly_in_use_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of a stated size is no reason to want 92 % of the memory free; and what is asked is valid."""
    import vllm
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    asked: dict[str, Any] = {}

    def stop(**named: Any) -> None:
        asked.update(named)
        raise InterruptedError

    monkeypatch.setattr(vllm, "LLM", stop)
    with pytest.raises(InterruptedError):
        backend.Engine(a_job(write_model(tmp_path, "llama"), enforce_eager=False))
    names = ("gpu_memory_utilization", "kv_cache_memory_bytes")
    config = CacheConfig(**{name: asked[name] for name in names if name in asked})
    half_full: Any = SimpleNamespace(total_memory=80 << 30, free_memory=40 << 30, device_="cuda:0")
    assert request_memory(half_full, config) < 1 << 30
    assert config.kv_cache_memory_bytes == vllm_cache.reserved_bytes(a_job(tmp_path), str(tmp_path), "bfloat16", True)


@pytest.mark.parametrize(("flags", "reads"), [("fpu amx_bf16 amx_tile", True), ("fpu avx512f", False)])
def test_experts_of_four_bits_need_amx(
    flags: str, reads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    dense, experts = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight"

    def refusal(name: str, kind: str, cuda: bool = False) -> str | None:
        return backend.unsupported(Artifact("v", "awq", "awq", "", "", 1, 1, tensor_types={name: kind}), cuda)

    assert refusal(dense, "I4-g128") is refusal(experts, "F16") is refusal(experts, "I4-g128", cuda=True) is None
    assert (refusal(experts, "I4-g128") is None) is reads


def test_packed_experts_with_biases_are_told_before_they_are_loaded() -> None:
    """vLLM's reader of gpt-oss passes over names that it does not know."""
    name = "model.layers.0.mlp.experts.0.up_proj"

    def refusal(types: dict[str, str]) -> str | None:
        return backend.unsupported(Artifact("v", "gptq", "gptq", "", "", 1, 1, tensor_types=types), True)

    assert "experts with biases (gpt-oss's)" in str(refusal({f"{name}.weight": "I4-g128", f"{name}.bias": "BF16"}))
    assert refusal({f"{name}.weight": "BF16", f"{name}.bias": "BF16"}) is None
    assert refusal({f"{name}.weight": "I4-g128", "model.layers.0.self_attn.q_proj.bias": "BF16"}) is None


def load(payload: Any, progress: Any) -> str:
    """A worker: what the engine says to a checkpoint that it loads, or its likeliest next tokens."""
    try:
        engine = backend.Engine(from_json(Job, payload))
    except ValueError as error:
        return str(error)
    return str(engine.complete([list(range(10, 30))], [8], []))


@pytest.mark.slow
def test_a_quantized_checkpoint_that_lacks_a_tensor_is_an_error(tmp_path: Path) -> None:
    """vLLM by itself leaves the tensor as it was made. Whole, each runs on its CPU build."""
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "qwen2", head_dim=32, hidden_size=128, num_attention_heads=4)
    cases = [("compressed-tensors", write_compressed(base, tmp_path / scheme, scheme)) for scheme in SCHEMES]
    tokens, entries = write_tokens(tmp_path / "t.json", [40] * 24), []
    for name in ("awq", "gptq"):
        cases.append((name, tmp_path / name))
        entries.append({"name": name, "method": name, "options": {"group_size": 32}, "out": str(tmp_path / name)})
    request = {"base": str(base), "tokens": str(tokens), "tokens_digest": "t", "variants": entries, "imatrix_out": None}
    calibrate.run({**request, "state": str(tmp_path / "s"), "device": "cpu", "threads": 1}, lambda *_: None)
    for format, folder in cases:
        whole = load_file(folder / "model.safetensors")
        lacks = next(name for name in whole if "layers.1.mlp.down_proj" in name and "scale" in name)
        for without in ("", lacks) if format != "gptq" else ("",):
            save_file({k: t for k, t in whole.items() if k != without}, folder / "model.safetensors", {"format": "pt"})
            job = to_json(a_job(folder))
            job["artifact"]["format"] = format
            reply = isolate.call(
                "tests.worker.backends.test_vllm:load",
                job,
                workdir=tmp_path / "w",
                time_limit_s=300,
                environment=backend.ENVIRONMENT | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )
            assert reply.error is None, reply.log
            said = str(reply.value)
            assert ("not initialized from checkpoint" in said and lacks in said) if without else said.count(",") == 7


def child(payload: Any, progress: Any) -> dict[str, Any]:
    """A worker: what the engine says of its memory after a point, while this process takes 200 MiB."""
    import os

    engine = backend.Engine(from_json(Job, payload["job"]))
    engine.forget_peak()
    taken = bytearray(os.urandom(1 << 20)) * payload["mib"]
    for _ in engine.generate([list(range(10, 10 + PROMPT))] * 2, NEW):
        pass
    return {**engine.memory(), "taken": len(taken)}


def test_on_a_gpu_the_allocator_of_the_worker_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With counts in the place of a GPU's: what was allocated at the peak and is neither weights nor cache."""
    import torch

    worker: Any = vllm_inside.Extension()
    worker.device = torch.device("cuda")
    caches = [torch.zeros(4, dtype=torch.int8), (torch.zeros(3, dtype=torch.int8), torch.zeros(1, dtype=torch.int8))]
    worker.model_runner = SimpleNamespace(kv_caches=caches, model_memory_usage=100)
    peaks = [500]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peaks.append(100 + 8 + 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peaks[-1])
    worker.workbench_forget_peak()
    assert worker.workbench_memory() == {"weights": 100, "kv_cache_reserved": 8, "workspace": 30}


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["0", "1"], ids=["inside", "beside"])
def test_the_workspace_is_that_of_the_process_that_computes(tmp_path: Path, processes: str) -> None:
    """With tensor parallelism vLLM's workers are processes of their own, and this one's growth says nothing."""
    reply = isolate.call(
        "tests.worker.backends.test_vllm:child",
        {"job": to_json(a_job(write_model(tmp_path / "m", "llama", head_dim=32))), "mib": 200},
        workdir=tmp_path / "w",
        time_limit_s=300,
        environment=backend.ENVIRONMENT
        | {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": processes, "OMP_NUM_THREADS": "1"},
    )
    assert reply.error is None, reply.log
    memory = reply.value
    assert memory["embedding"] == 354 * 64 * 2 < memory["weights"]
    assert memory["kv_cache"] == 2 * 48 * 2 * 2 * 2 * 32 * 2 <= memory["kv_cache_reserved"]
    grown = memory["workspace"] / 2**20
    assert grown >= 199 if processes == "0" else 0 <= grown < 100
