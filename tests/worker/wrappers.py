"""Random multimodal models, of which the language model is taken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def write_whole(folder: Path, kind: str, text: Mapping[str, Any] | None = None, **more: Any) -> Any:
    """A random multimodal model, saved as transformers does; the model. `text` and `more`: entries of its configuration
    in the place of these."""
    import torch
    import transformers

    torch.manual_seed(0)
    given = WRAPPERS[kind][0] | more
    given["text_config"] = given["text_config"] | (text or {})
    config = transformers.AutoConfig.for_model(kind, **given)
    model: Any = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def seen(payload: dict[str, Any], progress: Any) -> None:
    """Logits of whole models of text with images in it, by transformers' own loader, into a safetensors file: one
    process for all, since its quantizers stay in the interpreter.

    Payload: `models` (name -> folder), `inputs` (name -> a safetensors file of what each is called with), `out`.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    found = {}
    for name, folder in payload["models"].items():
        kind: Any = AutoModelForImageTextToText
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"] and not report["mismatched_keys"], (name, report)
        with torch.inference_mode():
            found[name] = model.eval()(**load_file(payload["inputs"][name])).logits[0].float()
    save_file(found, payload["out"])
