"""The shape of a base: its configuration and its tensors' sizes, without its weights.

Enough for a plan. From a hub come `config.json` and the headers of the safetensors files (a few hundred KB of
range requests for a model of any size); from a directory the same; from a GGUF file its header; from a recipe's own
`config` nothing but that. An exact equivalent is described as it will be, not as its source is.

Rejected: building the model in transformers on the meta device. It imports for seconds, and knows no more than
a header does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from workbench.errors import UserError, install_with
from workbench.worker import Progress
from workbench.worker.base.checkpoint import DTYPES, checked_weights, main_dtype, parameters_of, read_json
from workbench.worker.base.dequantize import open_gguf
from workbench.worker.base.equivalent import equivalent_sizes
from workbench.worker.base.hub import fetch_headers, is_offline
from workbench.worker.base.random_weights import config_of
from workbench.worker.base.sources import kind_of, local_path, package_file


def read(payload: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Payload: `source` and `equivalent` as `base.prepare` takes them, `offline`.

    Returns `config` (a `config.json`'s content), `dtype` (that the prepared base will have), `tensors` (name ->
    shape, rows first; null where only a configuration is known) and `naming` of those names (`hf` or `gguf`).
    Raises `UserError` for a source that is not there or cannot be read.
    """
    source, equivalent = payload["source"], payload.get("equivalent")
    progress(0, 1, "reading the shape")
    kind = kind_of(source)
    if kind == "hub":
        offline = bool(payload.get("offline")) or is_offline()
        config, found = fetch_headers(source["hub"], source.get("revision") or "main", offline)
        shape = {"config": config, **_of_tensors(config, found)}
    elif kind == "config":
        shape = {"config": config_of(source["config"]), "dtype": "bfloat16", "tensors": None, "naming": "hf"}
    else:
        path = package_file(source["package"], source.get("file"))[0] if kind == "package" else local_path(source[kind])
        if path.is_dir():
            config = read_json(path / "config.json")
            counted = parameters_of(config, checked_weights(path))
            shape = {"config": config, **_described({n: t.shape for n, t in counted.items()}, main_dtype(counted))}
        else:
            shape = _of_gguf(path)
    if equivalent:
        _, new = equivalent_sizes(shape["config"], int(equivalent["hidden"]))
        changed = {
            "hidden_size": new["hidden"],
            "num_attention_heads": new["heads"],
            "num_key_value_heads": new["kv_heads"],
            "head_dim": new["head_dim"],
            "intermediate_size": new["mlp"],
        }
        shape = {"config": shape["config"] | changed, "dtype": "float32", "tensors": None, "naming": "hf"}
    progress(1, 1, "read the shape")
    return shape


def _described(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "tensors": {name: list(shape) for name, shape in tensors.items()}, "naming": "hf"}


def _of_tensors(config: dict[str, Any], found: dict[str, tuple[list[int], str]]) -> dict[str, Any]:
    """From headers alone: (shape, safetensors dtype) a tensor."""
    from workbench.worker.base.checkpoint import StoredTensor

    widths = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    tensors = {}
    for name, (shape, dtype) in found.items():
        weights = 1
        for side in shape:
            weights *= side
        tensors[name] = StoredTensor(Path("hub"), dtype, tuple(shape), weights * widths.get(dtype, 1))
    counted = parameters_of(config, tensors)
    return _described({name: tensor.shape for name, tensor in counted.items()}, main_dtype(counted))


def _of_gguf(path: Path) -> dict[str, Any]:
    """From a GGUF file's header, in the words of a `config.json`."""
    if path.suffix.lower() != ".gguf":
        raise UserError(f"{path} is a file but not a GGUF file. Name a Hugging Face directory or a .gguf file.")
    try:
        reader = open_gguf(path)
    except ImportError as error:
        raise install_with(f"the GGUF reader (module '{error.name}')", "pip install gguf") from None

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        return default if found is None else found.contents()

    kind = str(field("general.architecture"))
    tensors = {tensor.name: [int(n) for n in reversed(tensor.shape.tolist())] for tensor in reader.tensors}
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    main = max(sizes, key=lambda name: sizes[name])
    heads = int(field(f"{kind}.attention.head_count"))
    hidden = int(field(f"{kind}.embedding_length"))
    config = {
        # llama.cpp's name for Llama and Mistral alike; the others differ by punctuation at most.
        "model_type": re.sub(r"[^a-z0-9]", "_", kind.lower()),
        "architectures": ["LlamaForCausalLM" if kind == "llama" else kind],
        "hidden_size": hidden,
        "intermediate_size": int(field(f"{kind}.feed_forward_length", 0)),
        "num_hidden_layers": int(field(f"{kind}.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field(f"{kind}.attention.head_count_kv", heads)),
        "head_dim": int(field(f"{kind}.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(field(f"{kind}.context_length", 0)),
        "vocab_size": tensors["token_embd.weight"][0] if "token_embd.weight" in tensors else 0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "num_local_experts": int(field(f"{kind}.expert_count", 0)),
    }
    # Quantized weights become float32, 16-bit ones stay what they are (`dequantize.py`).
    return {"config": config, "dtype": DTYPES.get(main, "float32"), "tensors": tensors, "naming": "gguf"}
