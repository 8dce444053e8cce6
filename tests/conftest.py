"""Fast tests first; CUDA tests only where there is a GPU; nothing reaches a hub. Small models are made here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.places import ROOT
from workbench.first_calls import settle_when_torch_is_imported

settle_when_torch_is_imported()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
GIVEN = frozenset(os.environ)
"""Names of the variables that the tests began with."""
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell starts background jobs so, and what the tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Of several processes each has a folder of its own for temporary files: there lies the lock by which a machine
    does one heavy thing at a time, and a test would wait for those of the other process."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tempfile.mkdtemp(prefix="tests-")  # short: vLLM's sockets lie in it, whose names have 107 letters
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ["TMPDIR"], tempfile.tempdir = folder, None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fast tests compute on one thread: on tensors this small two of them wait for each other longer than they work."""
    torch = sys.modules.get("torch")
    if torch is None or request.node.get_closest_marker("slow"):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test has a library's settings of the hub: GPTQModel's tokenicer sets a cache in /tmp when it is imported."""
    for name in os.environ.keys() - GIVEN:
        if name.startswith("HF_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with the standard library only, as somebody's own engine environment may be."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


ON_A_SMALL_DISK = """
back=$PWD disk=$1 size=$2; shift 2
cd "$disk" && mount -t tmpfs -o size="$size" tmpfs "$disk" || exit
(cd "$back" && exec setpriv --pdeathsig KILL "$@"); code=$?
cp -R "$disk"/. .
exit $code
"""
"""A shell's program. Its working folder is the one that the mount hides, so the last line copies out of the disk."""


@pytest.fixture
def small_disk() -> Callable[[Path, str], list[str]]:
    """The words that, before a command, mount a disk of `size` ("600k") on an empty `folder` for it alone.

    It is mounted in a namespace of the command's own: no other process ever sees it, and the kernel unmounts it when
    the last process in there ends, however it ends; killing the tests kills the command. Then what it wrote lies in
    the folder. Skips where even that is not permitted.
    """

    def words(folder: Path, size: str) -> list[str]:
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        shell = ["setpriv", "--pdeathsig", "KILL", "unshare", *own, "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
        found = [*shell, str(folder), size]
        if not shutil.which("setpriv") or subprocess.run([*found, "true"], capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        return found

    return words


def write_llama(
    folder: Path,
    *,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab_size: int = 354,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """A random Llama as a Hugging Face directory, float32, without a tokenizer; written by numpy alone."""
    import numpy as np
    from safetensors.numpy import save_file

    head = hidden // heads
    shapes = {"model.embed_tokens.weight": (vocab_size, hidden)}
    shapes |= {} if tied else {"lm_head.weight": (vocab_size, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"model.layers.{layer}.self_attn.k_proj.weight": (kv_heads * head, hidden),
            f"model.layers.{layer}.self_attn.v_proj.weight": (kv_heads * head, hidden),
            f"model.layers.{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{layer}.mlp.gate_proj.weight": (intermediate, hidden),
            f"model.layers.{layer}.mlp.up_proj.weight": (intermediate, hidden),
            f"model.layers.{layer}.mlp.down_proj.weight": (hidden, intermediate),
        }
    chance = np.random.default_rng(seed)
    tensors = {name: chance.normal(0, 0.08, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"model.layers.{i}.{kind}_layernorm.weight" for i in range(layers) for kind in ("input", "post_attention")]
    tensors |= {name: np.ones(hidden, np.float32) for name in [*norms, "model.norm.weight"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A real tokenizer of Llama 2's kind: a token a character, any other byte by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += list(string.ascii_letters + string.digits + string.punctuation)
    model = BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in tokens[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers and 64 channels with a tokenizer; treat it as read-only."""
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("models") / "Tiny"))


@pytest.fixture(scope="session")
def talking_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The same, but it says characters alone. A random model says halves of them too, which servers keep to themselves,
    and llama_cpp.server gives more tokens than were asked for behind one."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "Talking"
    shutil.copytree(tiny_llama, folder)
    tensors = load_file(folder / "model.safetensors")
    # Of 95 random logits some are above zero.
    tensors["lm_head.weight"][: 3 + 256] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def make_llama() -> Any:
    """`write_llama`, for tests that need another shape."""
    return write_llama


@pytest.fixture(scope="session")
def make_tokenizer() -> Any:
    """`write_tokenizer`, for the same."""
    return write_tokenizer


@pytest.fixture(scope="session")
def real_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache in which the real model is prepared, once a session.

    `WORKBENCH_TEST_HOME=1` takes `$WORKBENCH_HOME` instead, where it may be from an earlier one.
    """
    kept = os.environ.get("WORKBENCH_HOME") if os.environ.get("WORKBENCH_TEST_HOME") else None
    return Path(kept) if kept else tmp_path_factory.mktemp("real") / "home"


@pytest.fixture(scope="session")
def real_base(real_home: Path) -> Path:
    """`recipes/tiny.yaml`'s base as a Hugging Face directory: a real model with its real tokenizer."""
    program = (
        "from workbench.quantize.base import prepare; from workbench.console import Console;"
        "from workbench.recipe.load import load;"
        "print(prepare(load('recipes/tiny.yaml'), Console(quiet=True)).path)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "WORKBENCH_HOME": str(real_home)},
    )
    assert answer.returncode == 0, answer.stderr
    return Path(answer.stdout.strip())


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A cache in which the small model's base, its GGUF form and its Q8_0 are made."""
    folder = tmp_path_factory.mktemp("cli")
    place = Bench(folder / "home", folder, tiny_llama)
    assert place("quantize", place.recipe()).returncode == 0
    return place.home


@pytest.fixture(scope="session")
def talking_file(shared_home: Path, tmp_path_factory: pytest.TempPathFactory, talking_llama: Path) -> Path:
    """`talking_llama` as a GGUF file of type Q8_0, for servers."""
    folder = tmp_path_factory.mktemp("talking")
    place = Bench(shared_home, folder, talking_llama)
    assert place("quantize", place.recipe(model="Talking"), "-o", str(folder / "out")).returncode == 0
    return next((folder / "out").rglob("*Q8_0.gguf"))


@pytest.fixture
def bench(shared_home: Path, tmp_path: Path, tiny_llama: Path) -> Iterator[Bench]:
    """The cache is shared by the tests, as it is by people's runs; results are each test's own."""
    place = Bench(shared_home, tmp_path, tiny_llama)
    yield place
    assert not place.workers()
