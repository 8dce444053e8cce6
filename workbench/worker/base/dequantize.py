"""From a GGUF file to a Hugging Face directory with the same weights, tokens and rope.

transformers reads GGUF files itself and is what de-quantizes here. What it leaves out is put back: Llama 3's rope
scaling, which llama.cpp stores as a tensor; pre-tokenizers that split digits; and BOS, which a GGUF says by a
flag and a tokenizer by its post-processor. Whatever cannot be carried over is refused, not dropped.

Rejected: an own table from GGUF's tensor names to Hugging Face's, a second copy of what transformers maintains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from workbench.disk import need_room
from workbench.errors import UserError, install_with
from workbench.shape import FLOATS
from workbench.worker import Progress
from workbench.worker.base.checkpoint import context_tokens, read_json
from workbench.worker.base.saving import SHARD_BYTES, for_both_readers, write_card, write_json

DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""GGUF pre-tokenizers that take every digit alone before GPT-2's splitting; transformers' reader leaves that out."""


def dequantized_directory(path: Path, out: Path, progress: Progress) -> str | None:
    """Write a GGUF file as a Hugging Face directory; returns the license the file names.

    float32 where the file is quantized, or where its own main type would round a tensor; else that type.
    Architectures: those that transformers reads with `gguf_file=`.
    """
    reader = open_gguf(path)
    architecture = str(field_of(reader, "general.architecture"))
    types = bytes_by_type(reader)
    main = max(types, key=lambda kind: types[kind])
    dtype = FLOATS[main].name if main in FLOATS and _fits(reader, types, main) else "float32"
    parameters = sum(int(t.n_elements) for t in reader.tensors)
    out.mkdir(parents=True, exist_ok=True)
    need_room(out, parameters * (4 if dtype == "float32" else 2))

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    progress(0, 4, f"reading {path.name}")
    try:
        with parsed_once(path, reader):
            AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(
            f"{path}: transformers cannot read GGUF files of the architecture '{architecture}' ({reason}). "
            "Use the model's safetensors."
        ) from None
    progress(1, 4, f"de-quantizing {path.name}")
    with parsed_once(path, reader):
        loaded = AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
        )
    progress(2, 4, "writing safetensors")
    config = mended(loaded.config, path, reader, architecture)
    # The loaded model remembers that it was a GGUF and refuses to be saved; one built from its config does not.
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True, max_shard_size=SHARD_BYTES)
    progress(3, 4, "writing the tokenizer")
    saved = read_json(out / "config.json")
    for key in ("_name_or_path", "_model_name_or_path"):
        saved.pop(key, None)
    saved["dtype"] = dtype
    write_json(out / "config.json", for_both_readers(saved))
    save_tokenizer(tokenizer, reader, out, context_tokens(saved))
    license_name: str | None = field_of(reader, "general.license")
    name = re.sub(r"[.-](?:I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)
    kinds = ", ".join(sorted(types))
    write_card(out, name, license_name, f"De-quantized from `{path.name}` ({kinds}) to {dtype} by the Workbench.")
    progress(4, 4, f"de-quantized {path.name}")
    return license_name


def open_gguf(path: Path) -> Any:
    """A GGUF file's reader, all tensors inside the file."""
    try:
        import gguf
    except ImportError:
        raise install_with("gguf", "pip install gguf") from None
    size_bytes = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with 'GGUF'). Fetch it again.")
    cut = UserError(
        f"{path} is truncated or damaged: its {size_bytes} bytes do not hold the tensors it lists. Fetch it again."
    )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError):
        raise cut from None
    if any(int(t.data_offset) + int(t.n_bytes) > size_bytes for t in reader.tensors):
        raise cut
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UserError(
            f"{path} is one part of {int(parts.contents())}: join them with llama.cpp's `llama-gguf-split "
            "--merge` first."
        )
    if not reader.tensors or reader.get_field("general.architecture") is None:
        raise UserError(f"{path} holds no model: no tensors, or no `general.architecture`.")
    return reader


@contextmanager
def parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """Answer transformers' own calls of the `gguf` package from what is read already.

    It parses the whole file at each of four steps and builds the table of names for every module of the model: of a
    small model's half minute, two thirds.
    """
    import gguf

    before = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}

    def parsed(asked: Any, *rest: Any) -> Any:
        return reader if Path(asked).resolve() == path.resolve() else before["GGUFReader"](asked, *rest)

    vars(gguf).update(GGUFReader=parsed, get_tensor_name_map=cache(before["get_tensor_name_map"]))
    try:
        yield
    finally:
        vars(gguf).update(before)


def field_of(reader: Any, key: str, default: Any = None) -> Any:
    """A field of a GGUF file's metadata."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def bytes_by_type(reader: Any) -> dict[str, int]:
    """How many bytes of a GGUF file's tensors are of each type."""
    found: dict[str, int] = {}
    for tensor in reader.tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return found


def _fits(reader: Any, types: dict[str, int], main: str) -> bool:
    """Whether one 16-bit type holds every tensor of a GGUF file exactly (norms are stored as float32 beside it)."""
    import torch

    if set(types) - {"F32", main}:
        return False
    kind = getattr(torch, FLOATS[main].name)
    wider = (torch.tensor(t.data.copy()) for t in reader.tensors if t.tensor_type.name == "F32")
    return all(torch.equal(t.to(kind).float(), t.float()) for t in wider)


def mended(config: Any, path: Path, reader: Any, architecture: str) -> Any:
    """A configuration that transformers read from a GGUF file, of plain weights and with all that the file says."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    scaling = _rope_scaling(path, reader, architecture, config)
    if scaling:
        config.rope_parameters = {**(config.rope_parameters or {}), **scaling}
    return config


def _rope_scaling(path: Path, reader: Any, architecture: str, config: Any) -> dict[str, Any] | None:
    """Rope scaling that the file has and transformers' GGUF reader leaves out; else None.

    llama.cpp stores Llama 3's scaling as a tensor of divisors, one a frequency (`rope_freqs.weight`). The
    formula that made them is public (Llama 3.1's model code), so its one free parameter, the factor, is
    read off the largest divisor and the result is compared with the whole tensor.
    """
    import numpy as np

    present = getattr(config, "rope_parameters", None) or {}
    if present.get("rope_type", "default") != "default":
        return None
    divisors = next(
        (np.asarray(t.data, dtype=np.float64) for t in reader.tensors if t.name == "rope_freqs.weight"), None
    )
    kind = field_of(reader, f"{architecture}.rope.scaling.type", "none")
    factor = field_of(reader, f"{architecture}.rope.scaling.factor")
    original = field_of(reader, f"{architecture}.rope.scaling.original_context_length")
    lost = UserError(
        f"{path}: its rope scaling cannot be carried into a Hugging Face configuration. Use the model's safetensors."
    )
    if divisors is not None and not np.allclose(divisors, 1):
        original = int(original or 8192)
        scaling = {
            "rope_type": "llama3",
            "factor": float(round(float(divisors.max()), 3)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        theta = float(field_of(reader, f"{architecture}.rope.freq_base", 10000.0))
        if not np.allclose(llama3_divisors(theta, 2 * len(divisors), scaling), divisors, rtol=1e-3):
            raise lost
        return scaling
    if kind == "none" or not factor or float(factor) == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise lost


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> Any:
    """What Llama 3.1 divides each of the `head_dim / 2` rope frequencies by."""
    import numpy as np

    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def save_tokenizer(tokenizer: Any, reader: Any, out: Path, context_length: int) -> None:
    """Save a GGUF's tokenizer in the form that transformers 4 and 5, vLLM and llama.cpp's converter all load."""
    model = field_of(reader, "tokenizer.ggml.model", "")
    pre = field_of(reader, "tokenizer.ggml.pre", "")
    # llama.cpp's own defaults for a file that does not say.
    by_default = model == "llama" or pre in ("llama3", "llama-v3", "llama-bpe")
    adds_bos = bool(field_of(reader, "tokenizer.ggml.add_bos_token", by_default))
    if pre in DIGIT_SPLITTERS:
        from tokenizers import pre_tokenizers

        # No merge joins digits, so this only shows where spaces precede one ("  3"); 0.1 % of a text's tokens differ.
        steps = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bos = tokenizer.bos_token
    if adds_bos and bos and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        from tokenizers.processors import Sequence, TemplateProcessing

        template = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        before = tokenizer.backend_tokenizer.post_processor
        tokenizer.backend_tokenizer.post_processor = Sequence([before, template]) if before else template
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = read_json(file)
    for key in ("is_local", "local_files_only", "backend", "gguf_file"):
        config.pop(key, None)
    # The class's name in transformers 5 is unknown to readers built on 4; this one both know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = context_length or config.get("model_max_length")
    template_file = out / "chat_template.jinja"
    if template_file.is_file():
        config["chat_template"] = template_file.read_text(encoding="utf-8")
    write_json(file, config)
