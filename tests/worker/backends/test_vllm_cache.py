"""How much vLLM is told to reserve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workbench.records import Artifact, Evaluation, Job, Workload
from workbench.worker.backends import vllm_cache


def a_job(path: Path, window: int = 0, **options: Any) -> Job:
    shape = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    shape |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128}
    (path / "config.json").write_text(json.dumps(shape))
    artifact = Artifact("v", "base", "safetensors", str(path), "", 1, 100_000)
    sets = {"x": Evaluation("x", "", "", window, "second-half", 1, window)} if window else {}
    return Job("b", artifact, "vllm", options, Workload(prompt_tokens=[8000], new_tokens=192, batches=[16]), sets)


def test_a_gpu_is_asked_for_its_own_part_in_the_width_of_its_values(tmp_path: Path) -> None:
    """`kv_cache_memory_bytes` is of each GPU; the 70B shape keeps 320 KiB of 16 bits a token."""

    def reserved_gib(cpu: bool = False, dtype: str = "bfloat16", **options: Any) -> float:
        return vllm_cache.reserved_bytes(a_job(tmp_path, **options), str(tmp_path), dtype, cpu) / 2**30

    whole = reserved_gib()
    assert 40 * vllm_cache.MARGIN <= whole < 42 * vllm_cache.MARGIN
    assert reserved_gib(tensor_parallel=4) * 4 == whole
    assert reserved_gib(tensor_parallel=16) * 8 == whole, "a GPU has a head at the least"
    assert reserved_gib(kv_cache="fp8") * 2 == whole == reserved_gib(dtype="float32") / 2
    assert reserved_gib(cpu=True) == 2 * whole


def test_windows_have_room_too(tmp_path: Path) -> None:
    many = vllm_cache.reserved_bytes(a_job(tmp_path, window=2**20), str(tmp_path), "bfloat16", False)
    assert many >= (2**20 + 1) * 320 * 1024
