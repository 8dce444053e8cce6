"""The language model of a multimodal checkpoint: it computes what the whole one does of text, and is a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.base.bases import logits, refusal, run
from workbench.plan.tensors import shape_of
from workbench.worker.base import headers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
THREE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
WRAPPERS: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3": (
        {"text_config": TEXT | {"query_pre_attn_scalar": 16, "sliding_window": 16}, "vision_config": SIGHT},
        "Gemma3ForCausalLM",
    ),
    "llava": (
        {"text_config": TEXT | {"model_type": "llama"}, "vision_config": SIGHT | {"model_type": "clip_vision_model"}},
        "LlamaForCausalLM",
    ),
    "mistral3": (
        {"text_config": TEXT | {"model_type": "mistral"}, "vision_config": SIGHT | {"model_type": "pixtral"}},
        "MistralForCausalLM",
    ),
    "qwen2_5_vl": (
        {
            "text_config": TEXT | {"model_type": "qwen2_5_vl_text", "rope_parameters": THREE},
            "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        },
        "Qwen2ForCausalLM",
    ),
}


def write_whole(folder: Path, kind: str) -> Any:
    """A random multimodal model, saved as transformers does; the model."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **WRAPPERS[kind][0])
    model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", WRAPPERS)
def test_it_computes_what_the_whole_one_does_of_text(kind: str, tmp_path: Path) -> None:
    whole = write_whole(tmp_path / "whole", kind)
    made = run({"path": str(tmp_path / "whole")}, tmp_path / "o")
    assert made["architecture"] == WRAPPERS[kind][1] and made["vocab_size"] == 160
    assert made["warnings"][0].startswith(
        f"of a {type(whole).__name__} its text model alone, a {made['architecture']}: "
    )
    with torch.no_grad():
        expected = whole(input_ids=torch.arange(3, 99)[None]).logits[0].double()
    torch.testing.assert_close(logits(made["path"]), expected, rtol=1e-5, atol=1e-5)
    planned = headers.read({"source": {"path": str(tmp_path / "whole")}}, lambda *_: None)
    assert shape_of(planned, "here").parameters == made["parameters"]


def test_sizes_that_are_its_classs_defaults(tmp_path: Path) -> None:
    """As Gemma 3's on the hub: its configuration does not even say how large the vocabulary is."""
    write_whole(tmp_path / "whole", "llava")
    file = tmp_path / "whole" / "config.json"
    config = json.loads(file.read_text())
    del config["text_config"]["rms_norm_eps"], config["text_config"]["hidden_act"]
    file.write_text(json.dumps(config))
    assert run({"path": str(tmp_path / "whole")}, tmp_path / "o")["architecture"] == "LlamaForCausalLM"
    del config["text_config"]["vocab_size"]
    file.write_text(json.dumps(config))
    said = refusal({"path": str(tmp_path / "whole")}, tmp_path / "p")
    assert "have another shape than config.json says" in said, "32,000 is the class's"


def test_a_wrapper_without_a_text_part(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_whole(tmp_path / "whole", "llava")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "language_model" not in k}, file, metadata={"format": "pt"})
    said = refusal({"path": str(tmp_path / "whole")}, tmp_path / "o")
    assert "none of its tensors is named as a language model's" in said
    cut = {k: t for k, t in tensors.items() if "layers.1.mlp" not in k}
    save_file(cut, file, metadata={"format": "pt"})
    assert "3 tensors of the LlamaForCausalLM" in refusal({"path": str(tmp_path / "whole")}, tmp_path / "p")
