"""Servers that somebody else started, as far as the workbench knows: real ones, on loopback, until the end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.places import ROOT


@contextmanager
def llama_server(file: Path, folder: Path, name: str) -> Iterator[str]:
    """Yields the address of the llama-server of the package xllamacpp with a GGUF file."""
    words = f"--model {file} --alias {name} --ctx-size 2048 --parallel 4 --threads 2"
    with _started([sys.executable, "-m", "workbench.worker.backends.llama_server", *words.split()], folder) as url:
        yield url


@contextmanager
def llama_cpp_server(file: Path, folder: Path, name: str, interrupts: bool = False) -> Iterator[str]:
    """The same of llama-cpp-python's own server, which by itself breaks an answer off for whoever asks next."""
    words = f"--model {file} --model_alias {name} --n_ctx 2048 --n_threads 2"
    words += f" --interrupt_requests {interrupts} --flash_attn true"
    with _started([sys.executable, "-m", "llama_cpp.server", *words.split()], folder, "/v1/models") as url:
        yield url


@contextmanager
def vllm_serve(checkpoint: Path, folder: Path, name: str) -> Iterator[str]:
    """The same of vLLM's with a checkpoint, which tells the whole vocabulary."""
    words = f"--model {checkpoint} --served-model-name {name} --max-logprobs -1 --enforce-eager --dtype float32"
    words += f" --max-model-len 256 --kv-cache-memory-bytes {1 << 28}"
    with _started([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split()], folder) as url:
        yield url


@contextmanager
def _started(words: list[str], folder: Path, health: str = "/health") -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as told:
        words = [*words, "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(words, stdout=told, stderr=told, env=environment, start_new_session=True)
    try:
        for _ in range(1200):
            # It listens before its model is loaded, and answers 503 until then.
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{health}"):
                break
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait()
