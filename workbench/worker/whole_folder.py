"""An AWQ or GPTQ language model put back into the multimodal model that it was taken from.

The language model is quantized and measured by itself (`base/text_part.py`). Here its tensors return under the names
that the whole checkpoint has for them; those of other senses, the configuration and what prepares images are as they
were. Which modules are not packed is told in the words of either method's readers: AWQ's `modules_to_not_convert`,
GPTQModel's `dynamic`.

Rejected: quantizing the whole model. Calibration texts say nothing of what reaches an eye.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.disk import need_room, remove
from workbench.errors import UserError
from workbench.records import MadeVariant, VariantRequest, from_json, to_json
from workbench.shape import DTYPES
from workbench.sizes import mib_text
from workbench.worker import Progress, Tensors
from workbench.worker.base import text_part
from workbench.worker.base.checkpoint import TOKENIZER_FILES, StoredTensor, checked_weights, read_json, read_model
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_json, write_shards
from workbench.worker.ggml.carry import PARTS
from workbench.worker.methods import checkpoint, gptq

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What prepares images and videos for a model."""


def carry(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest` whose `source` is an AWQ or GPTQ checkpoint of the language model and `whole` the
    folder that this was taken from: the folder. Returns `MadeVariant`; `UserError` where there is no whole model, or
    its names have no place for what is packed."""
    request: VariantRequest = from_json(VariantRequest, payload)
    source, out = Path(str(request.source)), Path(request.out)
    if not request.whole:
        raise UserError(
            "it is written back into a multimodal model, and the base is none, or was stored in 8 or 64 bits or "
            "rewritten: give a multimodal model in 16 or 32 bits as the base"
        )
    whole = Path(request.whole)
    if not whole.is_dir():
        raise UserError(f"{whole}, the multimodal model that the base was taken from, is gone: fetch it again")
    config, tensors = read_model(whole, request.allow_remote_code)
    quantized, said = checked_weights(source), read_json(source / "config.json")
    taken = text_part.inside(tensors)
    names = {name: back(name, taken) for name in quantized}
    # What the checkpoint leaves out of the text model (a head that is the embedding) stays as it was too.
    unpacked = {
        back(f"{name.removesuffix('.qweight')}.weight", taken) for name in quantized if name.endswith("qweight")
    }
    kept = {name: tensor for name, tensor in tensors.items() if name not in unpacked | {*names.values()}}
    out.mkdir()
    try:
        need_room(out, sum(each.size_bytes for group in (quantized, kept) for each in group.values()))
        write_shards(out, _parts(quantized, names, kept, tensors, progress), "pt")
    except BaseException:
        remove(out)
        raise
    others = {name: tensor for name, tensor in kept.items() if name not in taken.values()}
    copy_side_files(whole, out, ("generation_config.json", *PROCESSORS, *TOKENIZER_FILES))
    copy_side_files(source, out, ("README.md",))
    written = dict(config)
    written["quantization_config"] = spared(said["quantization_config"], senses(others))
    write_json(out / "config.json", for_both_readers(written))
    if (source / gptq.CONFIG_FILE).is_file():
        write_json(out / gptq.CONFIG_FILE, written["quantization_config"])
    how = checkpoint.scheme(said, source.name)
    types = {name: tensor.dtype for name, tensor in others.items()}
    types |= {names[name]: tensors[names[name]].dtype for name in quantized if not name.endswith(PARTS)}
    types |= dict.fromkeys(unpacked, how.tensor_type)
    bytes_beside = sum(tensor.size_bytes for tensor in others.values())
    return to_json(
        MadeVariant(
            types,
            # As everywhere the language model's alone: bits a weight are of that.
            disk_bytes=sum(tensor.size_bytes for tensor in quantized.values()),
            warnings=[
                f"the language model's own codes and scales in a {config['architectures'][0]}, beside {len(others)} "
                "tensors of other senses as they were "
                f"({mib_text(bytes_beside)}, which are not counted); measured of text alone"
            ],
            provenance={
                "carried": {"from": source.name, "types": [how.tensor_type], "largest_error": 0.0},
                "limits": how.limits | SERVERS,
            },
            format=how.method,
        )
    )


SERVERS = {"vllm-serve": "vLLM's server wants the processor of images of a whole multimodal model: take `vllm`"}
"""Backend name -> why it does not run such a folder."""


def back(name: str, taken: Mapping[str, str]) -> str:
    """What the whole checkpoint calls a tensor of the text model's, packed or not; `taken`: name of the text model ->
    the whole one's. `UserError` where it has no such tensor."""
    if name in taken:
        return taken[name]
    stem, _, part = name.rpartition(".")
    weight = taken.get(f"{stem}.weight")
    if weight is None:
        raise UserError(
            f"the multimodal model has no tensor '{stem}.weight': its experts are in one tensor, and packed one by one "
            "no reader finds them there. Take the language model by itself"
        )
    return weight.removesuffix("weight") + part


def senses(names: Mapping[str, object]) -> list[str]:
    """The modules beside the language model, by the tensors in them: the first words of their names, without `model.`
    that some have before it."""
    return sorted({name.removeprefix("model.").partition(".")[0] for name in names})


def spared(said: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    """A `quantization_config` that says of these modules too that they are not packed."""
    if said["quant_method"] == "gptq":
        beside: dict[str, object] = {rf"-:(.*\.)?{re.escape(module)}(\..*)?$": {} for module in modules}
        return {**said, "dynamic": {**(said.get("dynamic") or {}), **beside}}
    # transformers looks for the beginnings of its names, vLLM for parts of its own.
    both = [name for module in modules for name in (module, f"model.{module}")]
    return {**said, "modules_to_not_convert": [*(said.get("modules_to_not_convert") or []), *both]}


def _parts(
    quantized: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    kept: Mapping[str, StoredTensor],
    whole: Mapping[str, StoredTensor],
    progress: Progress,
) -> Iterator[Tensors]:
    """All tensors of the folder, one at a time. What is not packed has the dtype that it had in the whole model:
    transformers leaves what it renames in the file's."""
    import torch

    total = len(quantized) + len(kept)
    for done, (name, tensor) in enumerate(quantized.items()):
        progress(done, total, "writing the whole model")
        content, before = tensor.read(name), whole.get(names[name])
        yield {names[name]: content.to(getattr(torch, DTYPES[before.dtype].name)) if before else content}
    for done, (name, tensor) in enumerate(kept.items(), len(quantized)):
        progress(done, total, "writing the whole model")
        yield {name: tensor.read(name)}
