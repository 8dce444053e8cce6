"""A directory with the model alone: links to its files, without those that some reader would take for part of it.

Folders hold more than the model: Mistral's `consolidated.safetensors`, adapters, pickles, the shards of what was there
before a merge. Which of them are read differs from engine to engine, and a variant's folder would carry them along. And
a configuration may tie the head to the embedding while the files hold a head of its own, which some engines use and
some drop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.worker.base.checkpoint import PICKLES, StoredTensor
from workbench.worker.base.config_json import text_config
from workbench.worker.base.saving import write_json

ADAPTER = "adapter_config.json"


def alone(path: Path, config: Mapping[str, Any], tensors: dict[str, StoredTensor], out: Path) -> tuple[Path, list[str]]:
    """The directory itself, or `out` with links to the model's own files; and what was left out or changed, in words.

    `config`: of its config.json; `tensors`: those of the model, by name.
    """
    used = {tensor.file.name for tensor in tensors.values()}
    strays = sorted(
        file.name
        for file in path.iterdir()
        if file.name == ADAPTER or (file.suffix.lower() in (".safetensors", *PICKLES) and file.name not in used)
    )
    said = []
    if strays:
        shown = ", ".join(strays[:3]) + (", ..." if len(strays) > 3 else "")
        said.append(f"left out, no part of the model: {shown}")
        if ADAPTER in strays:
            said[-1] += ". To have an adapter merged, name it as the base's `adapter`"
    head = _own_head(config, tensors)
    if head:
        said.append(f"config.json ties the head to the embedding, but {head} differs from it: both are kept")
    if not said:
        return path, []
    out.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir() if path != out else ():
        if file.is_file() and file.name not in strays and not (head and file.name == "config.json"):
            link = out / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file.absolute())
    if head:
        write_json(out / "config.json", untied(config))
    return out, said


def untied(config: Mapping[str, Any]) -> dict[str, object]:
    """A configuration whose head is not the embedding."""
    apart = {"tie_word_embeddings": False}
    text = config.get("text_config")
    return {**config, **apart, **({"text_config": text | apart} if isinstance(text, dict) else {})}


def _own_head(config: Mapping[str, Any], tensors: dict[str, StoredTensor]) -> str | None:
    """The name of a stored head that a tied configuration disowns though it is not the embedding."""
    text = text_config(config)
    head = next((name for name in tensors if name.endswith("lm_head.weight")), None)
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if not (tied and head and embedding):
        return None
    import torch
    from safetensors import safe_open

    values = []
    for name in (head, embedding):
        with safe_open(tensors[name].file, framework="pt") as file:
            values.append(file.get_tensor(name))
    same = values[0].shape == values[1].shape and torch.equal(values[0].float(), values[1].float())
    return None if same else head
