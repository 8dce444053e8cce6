"""Directories that are written: shards, both generations' words, and a disk that is full."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.worker.base.bases import CONFIG, logits, refusal, run
from workbench.worker.base import saving
from workbench.worker.base.saving import for_both_readers


def test_random_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    whole = run({"config": CONFIG, "init": "random", "seed": 0}, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert whole["weight_bytes"] == 2 * whole["parameters"] and not whole["tokenizer"]
    logits(whole["path"])
    (tmp_path / "out" / files[1]).unlink()
    assert files[1] in refusal({"path": whole["path"]}, tmp_path / "x")


def test_config_is_read_by_both_generations() -> None:
    new = for_both_readers({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}, "dtype": "x"})
    assert new["rope_theta"] == 5e5 and new["torch_dtype"] == "x"
    assert new["rope_scaling"]["rope_type"] == "llama3" and new["rope_scaling"]["factor"] == 8.0
    old = for_both_readers({"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old["rope_parameters"] == {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    plain = for_both_readers({"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}})
    assert plain["rope_theta"] == 9.0 and "rope_scaling" not in plain


def test_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    said = refusal({"config": CONFIG, "init": "random", "seed": 0}, tmp_path / "o")
    assert "WORKBENCH_HOME" in said and "free" in said
