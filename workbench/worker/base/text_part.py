"""The language model of a multimodal one, by itself: what is quantized, measured and written as GGUF.

Such a checkpoint keeps the text model's tensors under another prefix, its sizes in `text_config`, and often only those
that are not its class's defaults. Here they become a checkpoint of the text model's own class, bit for bit. Whether it
is whole is looked at as of any base (`whole.py`): a name that was guessed wrong is a tensor that is missing.

Rejected: engines that load the whole model for text alone. They read other parts of it, and its images' processors.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing
from workbench.worker import Progress, Tensors
from workbench.worker.base.checkpoint import TOKENIZER_FILES, StoredTensor, is_multimodal
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_json, write_shards

INSIDE = re.compile(r"^(model\.)?language_model\.(?P<rest>.+)$")
"""Names of the language model's tensors, of transformers 4 and 5 alike; its head may stand outside."""
AS_ALONE = re.compile(r"^(model\.(embed_tokens|layers|norm)\.|lm_head\.)")
"""The same where it is named as a text model's are (Qwen2-VL)."""
HEAD = "lm_head.weight"
SAME = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models without a class of their own that, of text alone, compute what another does: a token's three positions
are then the same number, and so are the angles of its rotation."""
OF_THREE = ("mrope_section", "mrope_interleaved")
OUTSIDE = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Entries that stand beside `text_config`, where it has none of its own."""
DROPPED = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype")


def of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of a multimodal model's language model; None of any other model, and where transformers has no
    class for it by itself."""
    if not is_multimodal(config):
        return None
    with importing("transformers, which knows the architectures,", "pip install transformers"):
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
    try:
        text = AutoConfig.for_model(**config).get_text_config().to_dict()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # What is wrong with it is told where the whole of it is built.
    kind = SAME.get(str(text.get("model_type")), str(text.get("model_type")))
    named = CLASSES.get(kind)
    if not isinstance(named, str) or not named.endswith("ForCausalLM"):
        return None
    said = {key: config[key] for key in OUTSIDE if config.get(key) is not None and key not in config["text_config"]}
    kept = {key: value for key, value in (text | said).items() if key not in DROPPED and value is not None}
    if kind != text.get("model_type"):
        for rope in ("rope_parameters", "rope_scaling"):
            if isinstance(kept.get(rope), dict):
                plain = {key: value for key, value in kept[rope].items() if key not in OF_THREE}
                kept[rope] = plain | ({"rope_type": "default"} if plain.get("rope_type") == "mrope" else {})
    dtype = config.get("dtype") or config.get("torch_dtype") or config["text_config"].get("dtype")
    return {**kept, "model_type": kind, "architectures": [named], **({"dtype": dtype} if dtype else {})}


def inside(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name in a checkpoint of the text model -> that in the whole one's. `UserError` where there is no such part."""
    found = {}
    for name in tensors:
        part = INSIDE.match(name)
        if part:
            rest = part["rest"]
            found[rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"] = name
        elif AS_ALONE.match(name):
            found[name] = name
    if not found.keys() - {HEAD}:
        folder = next(iter(tensors.values())).file.parent
        raise UserError(
            f"{folder}: its config.json is that of a multimodal model, but none of its tensors is named as a language "
            "model's (`language_model.`). Give the text model by itself"
        )
    return found


def tied(text: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """The configuration by whether there is a head: the whole model's and its part's do not always agree."""
    return {**text, "tie_word_embeddings": HEAD not in names}


def write(
    path: Path,
    config: Mapping[str, Any],
    text: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    out: Path,
    progress: Progress,
) -> list[str]:
    """Write the text model, whose configuration is `text`; what was left out, in words."""
    names = inside(tensors)
    text = tied(text, names)

    def parts() -> Iterator[Tensors]:
        for done, (name, stored) in enumerate(names.items()):
            progress(done, len(names), "taking the text model")
            yield {name: tensors[stored].read(stored)}

    out.mkdir(parents=True, exist_ok=True)
    write_shards(out, parts(), "pt")
    write_json(out / "config.json", for_both_readers(text))
    copy_side_files(path, out, ("generation_config.json", "README.md", *TOKENIZER_FILES))
    whole, part = config["architectures"][0], text["architectures"][0]
    return [
        f"of a {whole} its text model alone, a {part}: {len(tensors) - len(names)} tensors of other senses are left out"
    ]
