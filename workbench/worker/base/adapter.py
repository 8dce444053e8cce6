"""A LoRA adapter merged into the base, by peft and in float32, before anything else is made of it.

W becomes W + s B A (arXiv 2106.09685) with whatever rank and scale peft reads of the adapter's configuration, rounded
once to the base's own type. What peft would take without a word is looked at beforehand: an adapter of another model,
and what is not in its weights alone. Everything but the changed matrices stays the base's, bit for bit.

Rejected: adapters beside a quantized base, which no engine here computes alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing, short
from workbench.worker import Progress, Tensors
from workbench.worker.base.alone import ADAPTER
from workbench.worker.base.checkpoint import (
    CONFIG_FILES,
    PICKLES,
    TOKENIZER_FILES,
    StoredTensor,
    only_pickles,
    read_header,
    read_json,
)
from workbench.worker.base.hub import download
from workbench.worker.base.saving import copy_side_files, write_shards
from workbench.worker.base.sources import BaseSource

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of the base's modules."""
PARTS = (".lora_A.weight", ".lora_B.weight")
UNMERGED = {
    "use_dora": "is DoRA, which also scales the base's rows",
    "lora_bias": "has biases",
    "modules_to_save": "brings whole modules of its own",
    "trainable_token_indices": "changes rows of the embedding",
    "target_parameters": "changes tensors that are no linear layers",
    "layer_replication": "repeats layers",
    "use_qalora": "is QALoRA",
    "alora_invocation_tokens": "takes effect from a token on",
}
"""Entries of a configuration that say that it is more than a product of two matrices."""
MEND = "Merge it where it was trained, with peft's merge_and_unload, and give the merged model as the base"


def fetch(source: BaseSource, offline: bool, progress: Progress) -> Path:
    """The adapter's folder. `UserError` if it is none."""
    if source.hub:
        path = download(source.hub, source.revision, offline, progress, also=(ADAPTER,))
    else:
        path, _ = source.located()
    if path.is_file() or not (path / ADAPTER).is_file():
        raise UserError(f"{path} is no adapter: it has no {ADAPTER}. A model of its own is a `base`, without `adapter`")
    if not (path / WEIGHTS).is_file():
        pickled = [file.name for file in path.iterdir() if file.suffix in PICKLES]
        if pickled:
            raise only_pickles(path, pickled)
        raise UserError(f"{path} has no {WEIGHTS}: it is incomplete. Fetch it again")
    return path


def files_of(adapter: Path) -> list[Path]:
    """What determines the result."""
    return [adapter / ADAPTER, adapter / WEIGHTS]


def merge(
    path: Path, tensors: Mapping[str, StoredTensor], adapter: Path, out: Path, remote_code: bool, progress: Progress
) -> list[str]:
    """Write the model of `path`, whose tensors are given, with an adapter merged; what was done, in words.

    Raises `UserError` for an adapter of another model, or one that is more than LoRA.
    """
    stems = check(adapter, tensors)
    with importing("peft, which merges adapters,", "pip install peft"):
        from peft import PeftModel
    import torch
    from transformers import AutoModelForCausalLM

    progress(0, 1, "merging the adapter")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=torch.float32, trust_remote_code=remote_code, local_files_only=True
    )
    modules = dict(model.named_modules())
    absent = [stem for stem in stems if not isinstance(modules.get(stem), torch.nn.Linear)]
    if absent:
        raise UserError(f"{adapter}: transformers' {type(model).__name__} has no linear layer {absent[0]}. {MEND}")
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    weights = {stem: merged.get_submodule(stem).weight.data for stem in stems}

    def parts() -> Iterator[Tensors]:
        for done, (name, tensor) in enumerate(tensors.items()):
            progress(done, len(tensors), "merging the adapter")
            stored, changed = tensor.read(name), weights.get(name.removesuffix(".weight"))
            yield {name: stored if changed is None else changed.to(stored.dtype).contiguous()}

    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        write_shards(out, parts(), "pt")
    copy_side_files(path, out, (*CONFIG_FILES, *TOKENIZER_FILES))
    of = read_json(adapter / ADAPTER).get("base_model_name_or_path")
    return [f"{adapter.name} is merged into {len(stems)} matrices; it says that it is an adapter of {short(of)}"]


def check(adapter: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The names of the linear layers that an adapter changes. `UserError` for one that is not LoRA alone, or not of a
    model with these tensors."""
    said, name = read_json(adapter / ADAPTER), adapter.name
    if said.get("peft_type") != "LORA":
        raise UserError(
            f"{name} is an adapter of the kind {short(said.get('peft_type'))}, and only LORA is merged. {MEND}"
        )
    more = [words for key, words in UNMERGED.items() if said.get(key)]
    if said.get("bias", "none") != "none":
        more.append("changes biases")
    if more:
        raise UserError(f"{name} {more[0]}, which is not merged here. {MEND}")
    held = read_header(adapter / WEIGHTS)
    other = [key for key in held if not (key.startswith(PREFIX) and key.endswith(PARTS))]
    if other:
        raise UserError(f"{name} holds {short(other[0])}, which is no matrix of LoRA. {MEND}")
    stems = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in held})
    of = short(said.get("base_model_name_or_path") or "a model that it does not name")
    unknown = [stem for stem in stems if f"{stem}.weight" not in tensors]
    if unknown or not stems:
        lacks = f"{len(unknown)} of its {len(stems)} modules are not in the base ({', '.join(unknown[:1])})"
        raise UserError(f"{name} is an adapter of another model ({of}): {lacks if stems else 'it changes nothing'}")
    for stem in stems:
        a, b = (held.get(f"{PREFIX}{stem}{part}") for part in PARTS)
        if a is None or b is None:
            raise UserError(f"{name}: {stem} has one of its two matrices only. Fetch it again")
        there = tensors[f"{stem}.weight"].shape
        if len(a.shape) != 2 or len(b.shape) != 2 or (b.shape[0], a.shape[1]) != there or a.shape[0] != b.shape[1]:
            theirs = " x ".join(map(str, (b.shape[0], a.shape[-1])))
            ours = " x ".join(map(str, there))
            raise UserError(f"{name} is an adapter of another model ({of}): its {stem} is {theirs}, the base's {ours}")
    return stems
