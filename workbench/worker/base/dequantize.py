"""From a GGUF file to a Hugging Face directory with the same weights, tokens and rope.

transformers reads GGUF files itself and is what de-quantizes here. What it leaves out is put back: of the model by
`gguf_config`, of the tokenizer here (pre-tokenizers that split digits; and BOS, which a GGUF says by a flag and a
tokenizer by its post-processor). Whatever cannot be carried over is refused, not dropped, and before anything is
written the model's logits are compared with llama.cpp's of the file itself.

Rejected: an own table from GGUF's tensor names to Hugging Face's, a second copy of what transformers maintains.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from workbench.disk import need_room
from workbench.errors import UserError
from workbench.shape import FLOATS
from workbench.worker import Progress, proof
from workbench.worker.base import sentencepiece
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import context_tokens
from workbench.worker.base.gguf_config import USE_SAFETENSORS, load_gguf, read_gguf
from workbench.worker.base.gguf_file import bytes_by_type, field_of, parsed_once
from workbench.worker.base.saving import SHARD_BYTES, for_both_readers, write_card, write_json
from workbench.worker.ggml.logits import logits_of
from workbench.worker.ggml.model import CONTEXT_STEP

DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""GGUF pre-tokenizers that take every digit alone before GPT-2's splitting; transformers' reader leaves that out."""


class Dequantized(NamedTuple):
    """`license` that the file names, `warnings`, which entries transformers' own configuration had wrong, and the
    quantized types of its tensors by bytes, the most first."""

    license: str | None
    warnings: list[str]
    carried: list[str]
    quantized_types: list[str]


def dequantized_directory(path: Path, out: Path, progress: Progress) -> Dequantized:
    """Write a GGUF file as a Hugging Face directory.

    float32 where the file is quantized, or where its own main type would round a tensor; else that type.
    Architectures: those that transformers reads with `gguf_file=`. Raises `UserError` unless it is the same function as
    llama.cpp's of the file; without llama.cpp that is not proven, which is a warning.
    """
    read = read_gguf(path)
    reader, config = read.reader, read.config
    types = bytes_by_type(reader)
    main = max(types, key=lambda kind: types[kind])
    dtype = FLOATS[main].name if main in FLOATS and _fits(reader, types, main) else "float32"
    parameters = sum(int(t.n_elements) for t in reader.tensors)
    out.mkdir(parents=True, exist_ok=True)
    need_room(out, parameters * (4 if dtype == "float32" else 2))

    import torch
    from transformers import AutoTokenizer

    progress(0, 4, f"reading {path.name}")
    try:
        with parsed_once(path, reader):
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:  # transformers raises whatever an unknown vocabulary led to
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(f"{path}: transformers cannot read its tokenizer ({reason}). {USE_SAFETENSORS}") from None
    progress(1, 4, f"de-quantizing {path.name}")
    # Eager: the only attention that caps its logits, as Gemma 2 does.
    loaded = load_gguf(path, {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}, read)
    # llama.cpp looks GELU up in a table of 16-bit numbers.
    exact = set(types) == {"F32"} and "gelu" not in str(config.to_dict())
    warnings = _proven(path, loaded, proof.SAME_WEIGHTS_NATS if exact else proof.ROUNDED_NATS)
    progress(2, 4, "writing safetensors")
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
    quantized = sorted(types.keys() - FLOATS.keys(), key=lambda kind: -types[kind])
    return Dequantized(license_name, warnings, read.carried, quantized)


def _proven(path: Path, model: Any, limit_nats: float) -> list[str]:
    """See that a model gives llama.cpp's logits of the file it was read from; a warning where there is no llama.cpp."""
    count, rope = proof.TOKENS, getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope["original_max_position_embeddings"] < CONTEXT_STEP:
        # llama.cpp's context is then long already, and it takes the long factors.
        count += CONTEXT_STEP
    ids = proof.ids_for(model, count)
    try:
        expected = logits_of(path, ids)
    except ImportError:
        return [
            f"llama-cpp-python is not installed: not proven that {path.name} is the same model here as in llama.cpp"
        ]
    if expected is None:
        raise UserError(f"{path}: llama.cpp cannot load it; see the log for its words. {USE_SAFETENSORS}")
    found = proof.compare(expected, proof.logits_of(model, ids), limit_nats)
    if not found.same:
        raise UserError(
            f"{path}: transformers makes another model of it than llama.cpp {found.words}. {USE_SAFETENSORS}"
        )
    return []


def _fits(reader: Any, types: dict[str, int], main: str) -> bool:
    """Whether one 16-bit type holds every tensor of a GGUF file exactly (norms are stored as float32 beside it)."""
    import torch

    if set(types) - {"F32", main}:
        return False
    kind = getattr(torch, FLOATS[main].name)
    wider = (torch.tensor(t.data.copy()) for t in reader.tensors if t.tensor_type.name == "F32")
    return all(torch.equal(t.to(kind).float(), t.float()) for t in wider)


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
    pieces = sentencepiece.model_of(reader)
    if pieces:
        (out / "tokenizer.model").write_bytes(pieces)
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
