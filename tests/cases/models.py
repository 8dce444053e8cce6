"""Models of the cases: of two layers, random, and with logits and attention far from even, so that any slip shows.

A divergence from their base says whether it is the same function, and nothing else.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.bench import Bench

TEXT = {"module": "pydoc_data.topics"}
MEASURED: dict[str, Any] = {
    "calibration": {"source": TEXT, "window": 128, "windows": 16, "seed": 1},
    "evaluation": {"source": TEXT, "window": 128, "windows": 4},
    "workload": {"prompt_tokens": 16, "new_tokens": 2, "repeats": 1},
}
"""The parts of a case's recipe beside its variants and engines, for `Bench.recipe`."""
SIZES: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**more: Any) -> Any:
    """A `LlamaConfig` of `SIZES`."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **more})


def write_random(
    folder: Path, config: Any, *, kind: Any = None, qk: float = 2.0, embedding: float = 1.0, gemma: bool = False
) -> Path:
    """A random model of a transformers configuration as a Hugging Face directory, float32, with a tokenizer.

    `kind`: its class, if it is no causal language model; `qk`: how far from even attention is.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = (kind(config) if kind else AutoModelForCausalLM.from_config(config)).float().eval()
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=chance)
            if "norm" in name:
                parameter.add_(drawn * 0.2)
            elif name.endswith("bias"):
                parameter.copy_(drawn * 0.3)
            elif parameter.dim() > 1:
                scale = parameter.shape[-1] ** -0.5
                if "embed" in name:
                    scale = embedding
                elif "lm_head" in name:
                    scale *= 2
                elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                    scale *= qk**0.5
                parameter.copy_(drawn * scale)
    model.save_pretrained(folder)
    return write_vocabulary(folder, gemma)


def write_vocabulary(folder: Path, gemma: bool = False) -> Path:
    """A SentencePiece tokenizer of 768 pieces in a folder: `tokenizer.json`, `.model` and `tokenizer_config.json`."""
    for name, content in _vocabulary(gemma).items():
        (folder / name).write_bytes(content)
    return folder


@cache
def _vocabulary(gemma: bool) -> dict[str, bytes]:
    """Its files. Trained once a process on Python's documentation; Gemma's has other ids of its special tokens."""
    import pydoc_data.topics

    import sentencepiece
    from transformers import GemmaTokenizer, LlamaTokenizer

    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))[:400_000]
    ids = {"unk_id": 3, "bos_id": 2, "eos_id": 1, "pad_id": 0} if gemma else {"pad_id": -1}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=768,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            num_threads=1,
            normalization_rule_name="identity",
            add_dummy_prefix=not gemma,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            **ids,
        )
        (folder / "tokenizer.vocab").unlink()
        (GemmaTokenizer if gemma else LlamaTokenizer).from_pretrained(folder).save_pretrained(folder)
        configure(folder / "tokenizer_config.json", is_local=None, local_files_only=None, backend=None)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def configure(file: Path, **changes: Any) -> None:
    """Change entries of a JSON object in a file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=1))


def rows_of(bench: Bench) -> dict[tuple[str, str], dict[str, Any]]:
    """The table that the stored rows give, by variant and engine: its records in JSON (`kld_mean`, `notes`, ...)."""
    answer = bench("table", "--format", "json")
    assert answer.returncode == 0, answer.stderr
    return {(row["variant"], row["backend"]): row for row in json.loads(answer.stdout)}
