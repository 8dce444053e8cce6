"""A small base that is made once (read-only), and a copy of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.base.bases import CONFIG, run
from workbench.errors import UserError
from workbench.machine import isolate


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A small random Llama model with trained-looking norms, as a directory."""
    import torch
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("made") / "tiny"
    run({"config": CONFIG, "init": "random", "seed": 3, "tokenizer": str(tokenizer_dir)}, out)
    tensors = load_file(out / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = tensor + 0.3 * torch.randn_like(tensor)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture
def model(base_dir: Path, tmp_path: Path) -> Path:
    """A copy of `base_dir` to break."""
    return Path(shutil.copytree(base_dir, tmp_path / "model"))


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run a worker for real: its answer, or what it raised."""
    folder = tmp_path_factory.mktemp("work")

    def ask(function: str, payload: dict[str, Any]) -> Any:
        reply = isolate.call(function, payload, workdir=folder, time_limit_s=300, environment={"PYTHONPATH": str(ROOT)})
        if reply.user_error:
            raise UserError(reply.error)
        assert reply.error is None, f"{reply.error}\n{reply.log}"
        return reply.value

    return ask
