"""What a Hugging Face model directory holds, checked before anything trusts it.

Weights are safetensors; pickled weights run code when they are loaded and are refused, and so is a
configuration that asks for the model's own code. Sizes, types and completeness come from the files' headers,
so checking a 16 GB base reads a few kilobytes of it, and a download that was cut short is named here and not by
an engine an hour later.

Rejected: safetensors' own reader alone for the headers. It says that a file is bad but not by how many bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.disk import readable
from workbench.errors import UserError
from workbench.shape import DTYPES, FLOATS
from workbench.worker.architectures import stated
from workbench.worker.base.config_json import check_config, text_config

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
FILES = frozenset((*CONFIG_FILES, *TOKENIZER_FILES, "model.safetensors.index.json", "adapter_config.json"))
"""What is read of a folder beside its weights."""
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Those of these that are there hold JSON objects."""
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MISTRAL_FORMAT = "consolidated"
"""Prefix of weight files that repeat the model in Mistral's own layout."""

JSON_BYTES = 1 << 28
"""Of the largest JSON file that a model has (an index of a million tensors), and more."""
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
OTHER_SENSES = re.compile(r"vision|visual|image|video|audio|speech|projector")
"""Parts of the names of a multimodal model's tensors that no text goes through."""
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
FLOAT8_SCALES = (".weight_scale_inv", ".weight_scale")
"""Ends of the names of what FP8 weights are to be multiplied by, whatever the first is called."""
PACKED = {
    "awq": (".qweight",),
    "gptq": (".qweight",),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "mxfp4": ("_blocks",),
}
"""How weights are packed that are unpacked without loss, by `quant_method`, and ends of the names of such tensors."""
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: what a safetensors header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    def read(self, name: str) -> Any:
        """The tensor itself, which is called `name`, in torch."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(name)

    def of_type(self, dtype: str) -> StoredTensor:
        """The same in another type of `DTYPES`."""
        return replace(self, dtype=dtype, size_bytes=DTYPES[dtype].size_bytes * math.prod(self.shape))


def read_model(path: Path, remote_code: bool) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """A directory's config.json and the tensors of its model by name, checked as far as headers go.

    Raises `UserError` for whatever is no unquantized causal language model's.
    """
    with readable(path):
        for file in path.iterdir():
            # A pipe would be waited for, a device read for ever.
            if (file.name in FILES or file.suffix == ".safetensors") and not file.is_file():
                raise UserError(f"{file} is no regular file. Put the model's own there, or remove it.")
        config = checked_config(path, remote_code)
        for name in SIDE_FILES:
            if (path / name).exists():
                read_json(path / name)
        tensors = checked_weights(path)
        check_types(path, config, tensors)
    layers = stated(text_config(config), "num_hidden_layers") or 0
    if layers > len(tensors):
        raise UserError(f"{path / 'config.json'} names {layers} layers, its files hold {len(tensors)} tensors in all.")
    return config, tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if the file holds anything else."""
    try:
        if path.stat().st_size > JSON_BYTES:
            raise ValueError("it is larger than any model's")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): the file is damaged or cut short. Fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object. Fetch it again.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys say one thing each: readers differ in which of two values they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"it says two things of '{key[:80]}'")
    return found


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def checked_config(path: Path, remote_code: bool) -> dict[str, Any]:
    """A directory's config.json; `UserError` unless it is an unquantized causal language model's."""
    file = path / "config.json"
    if not file.is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if ggufs:
            raise UserError(f"{path} has no config.json but GGUF files: name one, as in `path: {path / ggufs[0]}`.")
        if (path / "adapter_config.json").is_file():
            of = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "a model"
            raise UserError(
                f"{path} is an adapter of {of}, no model: give that as the base, and this as its `adapter`."
            )
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
    named = config.get("architectures")
    if not named or not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{file} names no `architectures`: it is not a causal language model's configuration.")
    # Multimodal models leave out what is their class's default (`text_part.py`).
    if text_config(config).get("vocab_size") is None and not is_multimodal(config):
        raise UserError(f"{file} has no `vocab_size`: it is not a causal language model's configuration.")
    check_config(config, file)
    return config


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a language model with other senses around it."""
    return isinstance(config.get("text_config"), dict) and "vision_config" in config


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; `UserError` if the file is damaged or cut short.

    Layout: eight bytes of little-endian header length, that much JSON, then the data; a tensor's
    `data_offsets` count from the end of the header, and the data fill the file exactly.
    """
    from safetensors import safe_open

    size_bytes = path.stat().st_size
    damaged = f"{path} is not a whole safetensors file"
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size_bytes - 8, 100_000_000):
            raise UserError(f"{damaged}: its header does not fit into its {size_bytes} bytes. Fetch it again.")
        try:
            header = json.loads(handle.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            tensors = {
                name: StoredTensor(path, h["dtype"], tuple(h["shape"]), h["data_offsets"][1] - h["data_offsets"][0])
                for name, h in header.items()
            }
            end = max((h["data_offsets"][1] for h in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise UserError(f"{damaged}: its header cannot be read. Fetch it again.") from None
    if 8 + length + end != size_bytes:
        state = "truncated" if size_bytes < 8 + length + end else "longer than its header says"
        raise UserError(f"{path} is {state}: {size_bytes} bytes, should be {8 + length + end}. Fetch it again.")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except Exception as error:  # safetensors' own type, which is not exported everywhere
        raise UserError(f"{damaged}: {str(error)[:120]}. Fetch it again.") from None
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
    index = path / INDEX
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
        # A shard's name comes from a file: it may not lead out of the directory.
        shards = sorted(set(map(str, weight_map.values())))
        missing = [s for s in shards if Path(s).name != s or not (path / s).is_file()]
        if missing:
            raise UserError(
                f"{path} is incomplete: {len(missing)} of {len(shards)} shards are missing ({missing[0]}). "
                "Fetch it again."
            )
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            for name, tensor in read_header(path / shard).items():
                if name in tensors:
                    raise UserError(f"{path}: {tensors[name].file.name} and {shard} both hold {name}. Fetch it again.")
                tensors[name] = tensor
        absent = sorted(name for name, shard in weight_map.items() if name not in tensors)
        if absent:
            raise UserError(
                f"{path}: its index names {len(absent)} tensors that no shard holds ({absent[0]}, ...). Fetch it again."
            )
        moved = sorted(name for name, tensor in tensors.items() if weight_map.get(name) != tensor.file.name)
        if moved:
            raise UserError(
                f"{path}: its index does not say that {moved[0]} is in {tensors[moved[0]].file.name}. Fetch it again."
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


def behind(name: str, layers: int | None) -> bool:
    """Whether a tensor is of a layer behind the last of `layers`: one that drafts tokens (multi-token prediction), and
    that transformers leaves out."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and layers is not None and int(found[1]) >= layers


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


def scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The name of what an FP8 weight is to be multiplied by."""
    names = (name.removesuffix(".weight") + end for end in FLOAT8_SCALES)
    return next((scale for scale in names if scale in tensors), None)


def packed_by(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """The method of `PACKED` that a configuration names and by which tensors are packed; empty if there is none."""
    said = config.get("quantization_config")
    method = str(said.get("quant_method")) if isinstance(said, dict) else ""
    return method if any(name.endswith(PACKED.get(method, ())) for name in tensors) else ""


def check_types(path: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model that is already quantized, by what its config.json says or by the types of its tensors, but for
    FP8 with scales and what `PACKED` names."""
    if packed_by(config, tensors):
        return
    float8 = [name for name, tensor in tensors.items() if tensor.dtype in FLOAT8]
    scaled = bool(float8) and all(scale_of(name, tensors) for name in float8)
    quantized = next(filter(None, (c.get(k) for c in (config, text_config(config)) for k in QUANTIZATION_KEYS)), None)
    if quantized and not scaled:
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else "some method"
        where = path / "config.json"
        raise UserError(f"{where}: this model is already quantized ({method}). Give the unquantized model as the base.")
    for name, tensor in tensors.items():
        kind = tensor.dtype
        mask = kind in ("I64", "BOOL", "U8") and (len(tensor.shape) != 1 or name.endswith(NOT_WEIGHTS))
        if kind not in FLOATS and not mask and not (scaled and kind in FLOAT8):
            raise UserError(
                f"{path}: {name} is stored as {kind}: the model is already quantized. Give the "
                f"unquantized model as the base ({', '.join(sorted(dtype.name for dtype in FLOATS.values()))})."
            )
