"""Random weights of a shape: the same for a seed, and shapes that are impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.worker.base.bases import CONFIG, logits, refusal, run


def test_random_weights_are_reproducible_and_load(tmp_path: Path, tokenizer_dir: Path) -> None:
    import torch
    from safetensors.torch import load_file

    def make(name: str, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        source = {"config": CONFIG, "init": "random", "seed": seed, "tokenizer": str(tokenizer_dir)}
        reply = run(source, tmp_path / name)
        return reply, load_file(Path(reply["path"]) / "model.safetensors")

    (reply, one), (again, same), (_, other) = make("a", 0), make("b", 0), make("c", 1)
    key = "model.layers.1.mlp.up_proj.weight"
    assert reply["digest"] == again["digest"] and torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])
    assert one[key].dtype == torch.bfloat16 and abs(one[key].float().std() / 0.3 - 1) < 0.05
    assert "lm_head.weight" not in one
    assert torch.isfinite(logits(reply["path"])).all()


def test_bad_random_shapes(tmp_path: Path, tokenizer_dir: Path) -> None:
    def said(config: Any, **more: Any) -> str:
        return refusal({"config": config, "init": "random", "seed": 0, **more}, tmp_path / "o")

    assert "Did you mean 'llama'?" in said({**CONFIG, "model_type": "lama"})
    assert "no `model_type`" in said({"hidden_size": 4})
    assert "`hidden_size` is -4, not a whole number" in said({**CONFIG, "hidden_size": -4})
    assert "unknown init 'zeros'" in said(CONFIG, init="zeros")
    assert "does not exist" in said(str(tmp_path / "no.json"))
    assert "smaller than the tokenizer's 258" in said({**CONFIG, "vocab_size": 100}, tokenizer=str(tokenizer_dir))
    assert "no tokenizer" in said(CONFIG, tokenizer=str(tmp_path))
    assert "auto_map" in said({**CONFIG, "auto_map": {"AutoConfig": "x.Y"}})
