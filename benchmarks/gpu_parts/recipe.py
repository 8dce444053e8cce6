"""A tiny random model through every engine that is here."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import ROOT, Finding, Place

LIMIT_S = 180
MODULES = {"transformers": "transformers", "vllm": "vllm", "llamacpp": "llama_cpp"}
"""The workbench's names of engines, and their modules."""


def find(place: Place) -> Iterator[Finding]:
    """A tiny random model through every engine that is here, by the command that people type; with the
    first tile of each kernel, as above."""
    import yaml

    here = [name for name in place.engines if usable(name)]
    write_tiny(place.work / "Tiny")
    for seed, name in enumerate(("seen", "held-out")):
        chance = random.Random(seed)
        text = "".join(chance.choices(f"{string.ascii_lowercase}    ", k=20_000))
        (place.work / f"{name}.txt").write_text(text)
    variants: list[dict[str, object]] = [{"awq": {"group_size": 128}}, {"gptq": {"group_size": 128}}]
    variants += [{"gguf": "Q8_0"}, {"gguf": "Q4_K_M"}] if "llamacpp" in here else []
    # Where GPTQModel is not, what it makes is multiplied by the workbench's own kernels.
    own = {} if importlib.util.find_spec("gptqmodel") else {"kernel": "workbench"}
    content = {
        "name": "gpu-check",
        "model": "Tiny",
        "base": {"path": str(place.work / "Tiny")},
        "variants": variants,
        "calibration": {"source": {"file": "seen.txt"}, "window": 64, "windows": 8},
        "evaluation": {"source": {"file": "held-out.txt"}, "window": 64, "windows": 4},
        "workload": {"prompt_tokens": 32, "new_tokens": 16, "repeats": 2},
        "backends": {name: own if name == "transformers" else {} for name in here},
    }
    file = place.work / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    words = ["run", str(file), "--results", str(place.work / "results"), "--quiet", "--format", "json"]
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", *words],
        capture_output=True,
        text=True,
        cwd=place.work,
        env={
            **os.environ,
            "WORKBENCH_HOME": str(place.work / "home"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "HF_HUB_OFFLINE": "1",
            "WORKBENCH_KERNELS_TUNE": "0",
        },
    )
    try:
        rows = json.loads(answer.stdout)
    except ValueError:
        words = answer.stderr.strip().splitlines() or ["no output"]
        yield Finding("the tiny recipe", words[-1], "a table", False)
        return
    for row in rows:
        yield finding(row, place.device)


def usable(engine: str) -> bool:
    """Whether an engine is installed, here or in an interpreter of its own."""
    own = os.environ.get(f"WORKBENCH_PYTHON_{engine.upper()}")
    return bool(own) or importlib.util.find_spec(MODULES[engine]) is not None


def finding(row: dict[str, Any], device: str) -> Finding:
    """The line of one variant in one engine."""
    what = f"{row['variant']} in {row['backend']}"
    if row["unsupported"]:
        return Finding(what, str(row["unsupported"]))
    if row["error"]:
        return Finding(what, str(row["error"]), "measured", False)
    found = f"{row['decode_tok_s']:.0f} tok/s on {row['device']}"
    quality = row["perplexity"]
    found += f", perplexity {quality:.1f}" if quality is not None else ", no perplexity"
    holds = str(row["device"]).startswith(device) and quality is not None
    return Finding(what, found, f"measured on {device}", holds, {"decode_tok_s": row["decode_tok_s"]})


def write_tiny(folder: Path) -> None:
    """A random Llama of two layers with a tokenizer of Llama 2's kind, a token a character: every engine reads both."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += list(string.ascii_letters + string.digits + string.punctuation)
    model = BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in tokens[:3]])
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokens),
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
