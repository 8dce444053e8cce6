"""Whether a directory's files hold the whole model that its configuration names, and no other.

transformers fills what a checkpoint lacks with random numbers and drops what it does not know, with a report that
nobody reads; the other engines each do something else. So the model is built on torch's `meta` device, the names and
shapes of the files' headers go through transformers' own loader, which knows the names that its architectures had
before, and whatever is missing, unknown or of another shape refuses the base by name. No weight is read: a moment
for an 8B.

Rejected: comparing with a table of names an architecture. It would know yesterday's architectures.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing
from workbench.worker import Progress
from workbench.worker.architectures import stated
from workbench.worker.base.checkpoint import NOT_WEIGHTS, StoredTensor
from workbench.worker.base.config_json import text_config

OLDER = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "torch_dtype")
"""Entries that transformers' classes do not list but read."""
NEARLY = 0.9
"""How much two names have in common (`difflib`) of which one is a slip of the other."""
SHOWN = 3
"""Names of tensors in a message."""


def check_whole(path: Path, config: Mapping[str, Any], tensors: dict[str, StoredTensor], remote_code: bool) -> None:
    """Refuse a directory unless its tensors are the model of its configuration: none missing, none left over.

    `config`: of its config.json; `tensors`: of its files' headers. Raises `UserError` that names the tensors.
    """
    with importing("transformers, which knows the architectures,", "pip install transformers"):
        import torch
        from transformers import AutoConfig, GenerationConfig
    # Only where the model itself is code: a folder may carry code that a class of transformers has long replaced.
    remote_code = remote_code and "AutoModelForCausalLM" in (config.get("auto_map") or {})
    kind = _model_class(path, config, remote_code)
    try:
        settings = AutoConfig.from_pretrained(str(path), trust_remote_code=remote_code)
        check_names(path, config, settings)
        stored = {
            name: torch.empty(tensor.shape, dtype=torch.float32, device="meta")
            for name, tensor in tensors.items()
            if not name.endswith(NOT_WEIGHTS)
        }
        with _silent():
            model, report = kind.from_pretrained(
                None,
                config=settings,
                state_dict=stored,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        if (path / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(str(path))
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever an impossible configuration led to
        raise UserError(f"{path}: no model can be built from its config.json: {_reason(error)}") from None
    missing = sorted(set(report["missing_keys"]))
    unknown = sorted(set(report["unexpected_keys"]))
    other = sorted((str(name), list(there), list(wanted)) for name, there, wanted in report["mismatched_keys"])
    prefix = model.base_model_prefix
    named = [name for name in stored if name.startswith(f"{prefix}.")]
    if missing:
        advice = "Fetch it again, or give the model that it was cut from"
        if unknown:
            advice = f"It holds {_names(unknown)} instead: is it another model's, or saved under a wrapper's names?"
        raise UserError(
            f"{path}: {_count(missing)} of the {config['architectures'][0]} that config.json describes "
            f"{'is' if len(missing) == 1 else 'are'} not in its files: {_names(missing)}. {advice}"
        )
    if other:
        name, there, wanted = other[0]
        raise UserError(
            f"{path}: {_count(other)} {'has' if len(other) == 1 else 'have'} another shape than config.json says: "
            f"{name} has {there}, not {wanted}. Its config.json is another model's"
        )
    if unknown:
        raise UserError(
            f"{path}: its files hold {_count(unknown)} that a {config['architectures'][0]} has no place "
            f"for: {_names(unknown)}. Its config.json is another model's, or the files hold more than one model"
        )
    # A multimodal model's have always had other names in files than in its class, which every engine knows.
    if hasattr(model, prefix) and stored and not named and text_config(config) is config:
        raise UserError(
            f"{path}: its tensors lack the prefix '{prefix}.' of a {config['architectures'][0]} (it has "
            f"{_names(sorted(stored))}): engines would read different models. Save it again with transformers"
        )


def _model_class(path: Path, config: Mapping[str, Any], remote_code: bool) -> Any:
    """The class that a configuration names. `UserError` unless it is a causal language model's, or a wrapper's of
    one."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    name = str(config["architectures"][0])
    if remote_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(config["auto_map"]["AutoModelForCausalLM"], str(path))
    known = {
        kind
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
        for kinds in mapping.values()
        for kind in ([kinds] if isinstance(kinds, str) else kinds)
    }
    if name not in known or getattr(transformers, name, None) is None:
        causal = f"{name.split('For')[0].removesuffix('Model')}ForCausalLM"
        near = f" Give the {causal} that it was made from." if causal in known else ""
        raise UserError(f"{path}: config.json says {name}, which is not a causal language model.{near}")
    return getattr(transformers, name)


def check_names(path: Path, config: Mapping[str, Any], settings: Any) -> None:
    """Refuse a configuration that leaves out what shapes do not tell, or nearly names an entry: a default would take
    its place. `settings`: transformers' own of it."""
    text = settings.get_text_config()
    if text is not settings:
        if not isinstance(config.get("text_config"), dict):
            return  # A wrapper that has another name for its language model.
        config, settings = config["text_config"], text
    fields = {field.name for field in dataclasses.fields(settings)} if dataclasses.is_dataclass(settings) else set()
    other = {name: key for key, name in settings.attribute_map.items()} | settings.attribute_map
    heads = stated(config, "num_attention_heads") or config.get(other.get("num_attention_heads", ""))
    if heads is None and "num_attention_heads" in {*fields, *other}:
        raise UserError(f"{path / 'config.json'} has no `num_attention_heads`. Fetch it again.")
    known = fields | set(other) | set(OLDER)
    for key in config.keys() - known:
        near = difflib.get_close_matches(key, known - config.keys(), 1, NEARLY)
        if near:
            raise UserError(f"{path / 'config.json'}: unknown entry '{key[:80]}'. Did you mean '{near[0]}'?")


def check_finite(tensors: Mapping[str, StoredTensor], progress: Progress) -> None:
    """Refuse a model with a weight that is no number: engines fail on it, or only in the texts that meet it, and what
    is quantized with it is another model. Every weight is read once."""
    import torch
    from safetensors import safe_open

    total, done = sum(tensor.size_bytes for tensor in tensors.values()) or 1, 0
    for path in dict.fromkeys(tensor.file for tensor in tensors.values()):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, tensor in tensors.items() if tensor.file == path):
                tensor = file.get_tensor(name)
                # Both ends of a range with a NaN in it are NaN.
                if tensor.is_floating_point() and not all(end.isfinite() for end in torch.aminmax(tensor)):
                    raise UserError(f"{path}: {name} has NaN or infinite weights. Fetch it again.")
                done += tensors[name].size_bytes
                progress(done, total, "checking the weights")


def check_tokenizer(path: Path, vocab_size: int, remote_code: bool) -> None:
    """Refuse a directory whose tokenizer cannot be loaded, or has more tokens than the model, special ones apart (some
    models have no row for an image's)."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return
    load: Any = AutoTokenizer.from_pretrained
    try:
        with _silent():
            tokenizer = load(str(path), trust_remote_code=remote_code, local_files_only=True)
            tokenizer("a")
        size = int(tokenizer.vocab_size)
    except Exception as error:  # transformers raises whatever a broken file led to
        raise UserError(f"{path}: its tokenizer cannot be loaded: {_reason(error)}. Fetch it again.") from None
    if size > vocab_size:
        raise UserError(f"{path}: its tokenizer has {size} tokens, its model {vocab_size}: it is another model's.")


@contextmanager
def _silent() -> Iterator[None]:
    """transformers' report and progress bar, which would say the same in more words, left out."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    """An error's words on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _count(names: Sized) -> str:
    return f"{len(names)} tensor" + ("s" if len(names) > 1 else "")


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
