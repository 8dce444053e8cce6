"""The shape of a base: its configuration and its tensors' sizes, without its weights.

Enough for a plan. From a hub come `config.json` and the headers of the safetensors files (a few hundred KB of
range requests for a model of any size); from a directory the same; from a GGUF file its header; from a recipe's own
`config` nothing but that. An exact equivalent is described as it will be, not as its source is.

Rejected: building the model in transformers on the meta device. It imports for seconds, and knows no more than
a header does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.records import BaseRequest, from_json
from workbench.shape import DTYPE_BYTES, FLOATS, Described
from workbench.worker import Progress
from workbench.worker.base import text_part
from workbench.worker.base.checkpoint import (
    PICKLES,
    StoredTensor,
    checked_config,
    main_dtype,
    parameters_of,
    read_model,
)
from workbench.worker.base.equivalent import equivalent_sizes
from workbench.worker.base.floats import as_plain
from workbench.worker.base.gguf_config import check_keys, lost
from workbench.worker.base.gguf_file import bytes_by_type, field_of, open_gguf
from workbench.worker.base.hub import fetch_headers, is_offline
from workbench.worker.base.random_weights import config_of
from workbench.worker.base.sources import source_of


def read(payload: object, progress: Progress) -> Described:
    """Worker for a `BaseRequest`: what the base looks like. Raises `UserError` for a source that cannot be read."""
    request: BaseRequest = from_json(BaseRequest, payload)
    source = source_of(request.source)
    progress(0, 1, "reading the shape")
    if source.hub:
        offline = request.offline or is_offline()
        found = _of_files(*fetch_headers(source.hub, source.revision, offline, request.allow_remote_code))
    elif source.config:
        found = Described(config=config_of(source.config), dtype="bfloat16", tensors=None, naming="hf")
    else:
        path, _ = source.located()
        found = _of_directory(path, request.allow_remote_code) if path.is_dir() else _of_gguf(path)
    if request.equivalent:
        _, new = equivalent_sizes(found["config"], request.equivalent["hidden"])
        config = {**found["config"], **new.in_config()}
        found = Described(config=config, dtype="float32", tensors=None, naming="hf")
    progress(1, 1, "read the shape")
    return found


def _of_directory(path: Path, remote_code: bool) -> Described:
    """From a directory of a model, or of nothing but its configuration."""
    if any(file.name.endswith((".safetensors", ".index.json", *PICKLES)) for file in path.iterdir()):
        return _of_files(*read_model(path, remote_code))
    return _of_files(checked_config(path, remote_code), None)


def _of_files(config: Mapping[str, Any], tensors: dict[str, StoredTensor] | None) -> Described:
    """From a `config.json` and the headers of safetensors files, where there are any."""
    text = text_part.of(config)
    if tensors is None:
        config = text or config
        said = str(config.get("dtype") or config.get("torch_dtype"))
        dtype = said if said in DTYPE_BYTES else "bfloat16"
        return Described(config=config, dtype=dtype, tensors=None, naming="hf")
    plain = as_plain(config, tensors)
    if text:
        plain = {name: plain[stored] for name, stored in text_part.inside(plain).items()}
        config = text_part.tied(text, plain)
    counted = parameters_of(config, plain)
    shapes = {name: list(tensor.shape) for name, tensor in counted.items()}
    return Described(config=config, dtype=main_dtype(counted), tensors=shapes, naming="hf")


def _of_gguf(path: Path) -> Described:
    """From a GGUF file's header, in the words of a `config.json`."""
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{path} is a file but not a GGUF file. Name a Hugging Face directory or a .gguf file.")
    reader = open_gguf(path)
    kind = str(field_of(reader, "general.architecture"))
    check_keys(path, reader, kind)

    def number(key: str, default: int | None = None) -> int:
        value = field_of(reader, f"{kind}.{key}", default)
        if not isinstance(value, int):
            raise lost(path, f"its '{kind}.{key}' ({str(value)[:40]})")
        return value

    tensors = {tensor.name: [int(n) for n in reversed(tensor.shape.tolist())] for tensor in reader.tensors}
    sizes = bytes_by_type(reader)
    main = max(sizes, key=lambda name: sizes[name])
    heads, hidden = number("attention.head_count"), number("embedding_length")
    config = {
        # llama.cpp's name for Llama and Mistral alike; the others differ by punctuation at most.
        "model_type": re.sub(r"[^a-z0-9]", "_", kind.lower()),
        "architectures": ["LlamaForCausalLM" if kind == "llama" else kind],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length", 0),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": number("attention.key_length", hidden // heads),
        "max_position_embeddings": number("context_length", 0),
        "vocab_size": tensors["token_embd.weight"][0] if "token_embd.weight" in tensors else 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_local_experts": number("expert_count", 0),
    }
    # Quantized weights become float32, 16-bit ones stay what they are (`dequantize.py`).
    dtype = FLOATS[main].name if main in FLOATS else "float32"
    return Described(config=config, dtype=dtype, tensors=tensors, naming="gguf")
