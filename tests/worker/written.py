"""A checkpoint as llm-compressor has it written: by compressed-tensors' own functions, nothing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_compressed(base: Path, out: Path, scheme: str, group_size: int = 32) -> Path:
    """`base` in one of compressed-tensors' preset schemes, rounded to nearest."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    preset = preset_name_to_scheme(scheme, ["Linear"])
    if preset.weights.group_size:
        preset.weights.group_size = group_size
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": preset}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        table = module.weight.data.reshape(module.weight.shape[0], -1, preset.weights.group_size or module.in_features)
        scale, zero = calculate_qparams(table.amin(2), table.amax(2), preset.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    if (base / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def read_compressed(folder: Path) -> dict[str, Any]:
    """The linear layers' weights as compressed-tensors unpacks them, float32, by name."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = QuantizationConfig.model_validate(AutoConfig.from_pretrained(folder).quantization_config)
    (scheme,) = config.config_groups.values()
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    unpack = BaseCompressor.get_value_from_registry(str(config.format))
    found = {}
    for stem in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        parts = {name.removeprefix(f"{stem}."): each for name, each in tensors.items() if name.startswith(f"{stem}.")}
        found[f"{stem}.weight"] = unpack.decompress(parts, scheme)["weight"].float()
    return found
