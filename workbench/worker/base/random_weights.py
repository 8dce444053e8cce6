"""A base of a given shape with random weights, and perhaps another model's tokenizer.

Speed and memory do not depend on what the weights say, so a model that is too large to fetch, or does not exist
yet, can be measured by its configuration alone. transformers names the tensors (its model, built without
storage); the values come from one generator a tensor, so the same seed gives the same bytes.

Rejected: transformers' own initialisation, which needs the whole model in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError, unknown
from workbench.worker import Progress
from workbench.worker.base.checkpoint import TOKENIZER_FILES, read_json
from workbench.worker.base.config_json import check_config, context_tokens, text_config
from workbench.worker.base.dequantize import save_tokenizer
from workbench.worker.base.gguf_file import open_gguf
from workbench.worker.base.hub import download
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_card, write_json, write_weights
from workbench.worker.base.sources import BaseSource, content_digest, local_path, named_source


def random_directory(
    source: BaseSource, out: Path, remote_code: bool, offline: bool, progress: Progress
) -> tuple[Path, str, str | None]:
    """A model of a given shape with random bfloat16 weights, never whole in memory."""
    if source.init != "random":
        raise unknown("init", source.init, ["random"], "base")
    given = config_of(source.config)
    if given.get("auto_map") and not remote_code:
        raise UserError(
            "base.config asks to run the model's own Python code (`auto_map`), which is off (`allow_remote_code`)."
        )
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if given["model_type"] not in CONFIG_MAPPING:
        raise unknown("model_type", given["model_type"], CONFIG_MAPPING.keys(), "base.config")
    fields = {
        k: v
        for k, v in given.items()
        if k not in ("transformers_version", "quantization_config", "torch_dtype", "dtype")
    }
    build: Any = AutoModelForCausalLM.from_config
    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = build(config)
    except Exception as error:  # whatever impossible sizes led to, in whichever layer's constructor
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(
            f"base.config describes no causal language model that transformers can build ({reason})."
        ) from None
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if any(len(shape) > 2 for shape in names.values()):
        # transformers fuses experts in memory and splits them in files; the fused names are not a checkpoint's.
        raise UserError(
            "base.config: random weights of mixtures of experts are not supported. Use a dense model's shape."
        )
    std = float(getattr(config, "initializer_range", None) or 0.02)
    seed = source.seed

    def make(name: str) -> Any:
        if name.endswith("bias"):
            return torch.zeros(names[name])
        if len(names[name]) < 2:
            return torch.ones(names[name])
        # One generator a tensor: a tensor's values do not depend on the others or on their order.
        mixed = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        return torch.randn(names[name], generator=generator, dtype=torch.float32) * std

    out.mkdir(parents=True, exist_ok=True)
    write_weights(out, names, "bfloat16", make, progress, "writing random weights")
    saved = config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path"):
        saved.pop(key, None)
    saved["architectures"] = [type(model).__name__]
    saved["dtype"] = "bfloat16"
    write_json(out / "config.json", for_both_readers(saved))
    write_json(
        out / "generation_config.json",
        {k: saved[k] for k in ("bos_token_id", "eos_token_id") if saved.get(k) is not None},
    )
    tokenizer_id = None
    if source.tokenizer:
        tokenizer_id = _bring_tokenizer(named_source(source.tokenizer), out, saved, offline, progress)
    write_card(
        out, f"random-{given['model_type']}", None, f"Random weights of a shape, seed {seed}. Its text means nothing."
    )
    content = {"config": given, "seed": seed, "tokenizer": tokenizer_id}
    return out, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), None


def config_of(value: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """A model's configuration, given as such or as the path of one; `UserError` without a `model_type`."""
    config = value
    if isinstance(config, str):
        path = local_path(config)
        config = read_json(path / "config.json" if path.is_dir() else path)
    if not config.get("model_type"):
        raise UserError("base.config has no `model_type` (such as llama): transformers cannot tell what to build.")
    check_config(config, "base.config")
    return config


def _bring_tokenizer(
    source: BaseSource, out: Path, config: Mapping[str, Any], offline: bool, progress: Progress
) -> str:
    """Put another model's tokenizer beside these weights; returns what identifies it."""
    from transformers import AutoTokenizer

    if source.hub:
        path = download(source.hub, source.revision, offline, progress, weights=False)
    else:
        path, _ = source.located()
    if path.is_file():
        reader = open_gguf(path)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        save_tokenizer(tokenizer, reader, out, context_tokens(config))
        identity = str(path.stat().st_size)
    else:
        found = [path / n for n in TOKENIZER_FILES if (path / n).is_file()]
        if not found:
            raise UserError(
                f"{path} holds no tokenizer (tokenizer.json, tokenizer.model, ...). Name a directory that does."
            )
        copy_side_files(path, out, TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(str(out))
        identity = content_digest(found, progress)
    size, vocab_size = len(tokenizer), int(text_config(config)["vocab_size"])
    if size > vocab_size:
        raise UserError(
            f"base.config: vocab_size {vocab_size} is smaller than the tokenizer's {size} tokens. Set "
            f"vocab_size to {size} or more."
        )
    return identity
