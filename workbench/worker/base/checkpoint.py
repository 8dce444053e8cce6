"""What a Hugging Face model directory holds, checked before anything trusts it.

Weights are safetensors; pickled weights run code when they are loaded and are refused, and so is a
configuration that asks for the model's own code. Sizes, types and completeness come from the files' headers,
so checking a 16 GB base reads a few kilobytes of it, and a download that was cut short is named here and not by
an engine an hour later.

Rejected: safetensors' own reader for the headers. It says that a file is bad but not by how many bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.shape import DTYPES, FLOATS

CONFIG_FILES = ("config.json", "generation_config.json", "README.md")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MISTRAL_FORMAT = "consolidated"
"""Prefix of weight files that repeat the model in Mistral's own layout."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|projector")
"""Parts of the names of a multimodal model's tensors that no text goes through."""
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: what a safetensors header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): the file is damaged or cut short. Fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object. Fetch it again.")
    return value


def checked_config(path: Path, remote_code: bool) -> dict[str, Any]:
    """A directory's config.json; `UserError` unless it is an unquantized causal language model's."""
    file = path / "config.json"
    if not file.is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if ggufs:
            raise UserError(f"{path} has no config.json but GGUF files: name one, as in `path: {path / ggufs[0]}`.")
        if (path / "adapter_config.json").is_file():
            of = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "a model"
            raise UserError(f"{path} is an adapter of {of}, not a model: merge it into that first, as with peft.")
        raise UserError(f"{path} has no config.json: it is not a Hugging Face model directory, or is incomplete.")
    config = read_json(file)
    tokenizer = path / "tokenizer_config.json"
    if not remote_code:
        for name, content in ((file, config), (tokenizer, read_json(tokenizer) if tokenizer.is_file() else {})):
            if content.get("auto_map"):
                raise UserError(
                    f"{name} asks to run the model's own Python code (`auto_map`), which is off. If you "
                    "trust it, set `trust_remote_code: true` under `base` in the recipe."
                )
    quantized = next(filter(None, (c.get(k) for c in (config, text_config(config)) for k in QUANTIZATION_KEYS)), None)
    if quantized:
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else "some method"
        raise UserError(f"{file}: this model is already quantized ({method}). Give the unquantized model as the base.")
    if not config.get("architectures"):
        raise UserError(f"{file} names no `architectures`: it is not a causal language model's configuration.")
    if "vocab_size" not in text_config(config):
        raise UserError(f"{file} has no `vocab_size`: it is not a causal language model's configuration.")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where a multimodal configuration keeps its language model's sizes."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def context_tokens(config: Mapping[str, Any]) -> int:
    """The longest context a configuration allows, 0 if it does not say."""
    text = text_config(config)
    return next((int(text[key]) for key in CONTEXT_KEYS if text.get(key)), 0)


def window_tokens(config: Mapping[str, Any]) -> int:
    """The sliding window of a configuration's windowed layers, 0 if it has none."""
    text = text_config(config)
    kinds = text.get("layer_types") or ["sliding_attention"]
    used = text.get("use_sliding_window", True) and "sliding_attention" in kinds
    return int(text.get("sliding_window") or 0) if used else 0


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; `UserError` if the file is damaged or cut short.

    Layout: eight bytes of little-endian header length, that much JSON, then the data; a tensor's
    `data_offsets` count from the end of the header, and the data fill the file exactly.
    """
    size_bytes = path.stat().st_size
    damaged = f"{path} is not a whole safetensors file"
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size_bytes - 8, 100_000_000):
            raise UserError(f"{damaged}: its header does not fit into its {size_bytes} bytes. Fetch it again.")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(path, h["dtype"], tuple(h["shape"]), h["data_offsets"][1] - h["data_offsets"][0])
                for name, h in header.items()
            }
            end = max((h["data_offsets"][1] for h in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{damaged}: its header cannot be read. Fetch it again.") from None
    if 8 + length + end != size_bytes:
        state = "truncated" if size_bytes < 8 + length + end else "longer than its header says"
        raise UserError(f"{path} is {state}: {size_bytes} bytes, should be {8 + length + end}. Fetch it again.")
    return tensors


def lay_out(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file that is yet to be filled with tensors of these (safetensors dtype, shape), in this order.

    Its head (eight bytes of length, JSON, blanks up to a multiple of eight), where in the file each tensor begins, and
    the file's size in bytes.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    begins, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = offset, offset + DTYPES[dtype].size_bytes * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}, len(head) + offset


def checked_weights(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a model directory by name, every shard present and whole."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        named = set((read_json(index).get("weight_map") or {}).values()) if index.is_file() else set()
        if named - {"model.safetensors"}:
            raise UserError(
                f"{path} holds two sets of weights, model.safetensors and the shards of {index.name}, and engines "
                "differ in which they read. Remove the one that is not meant."
            )
        return read_header(path / "model.safetensors")
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no `weight_map`. Fetch it again.")
        shards = sorted(set(weight_map.values()))
        # A shard's name comes from a file: it may not lead out of the directory.
        missing = [s for s in shards if Path(s).name != s or not (path / s).is_file()]
        if missing:
            raise UserError(
                f"{path} is incomplete: {len(missing)} of {len(shards)} shards are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch them again."
            )
        tensors = {name: t for shard in shards for name, t in read_header(path / shard).items()}
        absent = sorted(set(weight_map) - set(tensors))
        if absent:
            raise UserError(
                f"{path}: its index names {len(absent)} tensors that no shard holds ({absent[0]}, ...). Fetch it again."
            )
        return tensors
    loose = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith(MISTRAL_FORMAT))
    if len(loose) == 1:
        return read_header(loose[0])
    if loose:
        raise UserError(
            f"{path} has {len(loose)} *.safetensors but no model.safetensors.index.json: it is incomplete. "
            "Fetch it again."
        )
    pickled = [p.name for p in path.iterdir() if p.suffix.lower() in PICKLES]
    if pickled:
        raise only_pickles(path, pickled)
    raise UserError(f"{path} has no *.safetensors: it is incomplete, or not a model. Safetensors and GGUF only.")


def only_pickles(where: str | Path, names: list[str]) -> UserError:
    """The error for weights in no format but pickle."""
    return UserError(
        f"{where} holds only pickled weights ({', '.join(sorted(names)[:3])}), which can run code when "
        "loaded: safetensors and GGUF only. Use a revision with *.safetensors, or convert it where you trust it."
    )


def parameters_of(config: Mapping[str, Any], tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that count as parameters: no buffers, a tied output matrix once, and of a multimodal model what reads
    text."""
    text = text_config(config)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    if text is not config:
        tensors = {name: tensor for name, tensor in tensors.items() if not OTHER_SENSES.search(name)}
    has_input = any("embed" in name or name.endswith("wte.weight") for name in tensors)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(NOT_WEIGHTS) and not (tied and has_input and name.endswith("lm_head.weight"))
    }


def main_dtype(tensors: dict[str, StoredTensor]) -> str:
    """The type that holds the most bytes, in torch's words."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    main = max(sizes, key=lambda dtype: sizes[dtype])
    return FLOATS[main].name if main in FLOATS else main.lower()


def check_types(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Refuse matrices of a type that is no plain floating point: they are quantized, whatever config.json says."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and len(tensor.shape) > 1 and tensor.dtype not in ("I64", "BOOL"):
            raise UserError(
                f"{path}: {name} is stored as {tensor.dtype}: the model is already quantized. Give the "
                f"unquantized model as the base ({', '.join(sorted(dtype.name for dtype in FLOATS.values()))})."
            )
