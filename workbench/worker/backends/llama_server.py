"""llama.cpp's own server: the `llama-server` on the PATH, or else the one in the package xllamacpp.

As a program (`python -m workbench.worker.backends.llama_server`) it is that of the package, which has no command line,
under the words of `llama-server` that are used here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading

from workbench.records import Job, from_json
from workbench.worker.backends import llamacpp
from workbench.worker.backends.served import Server, alias, as_row

MODULE = "xllamacpp"
PACKAGES: tuple[str, ...] = ("xllamacpp",)
INSTALL = "pip install xllamacpp (or put llama.cpp's llama-server on the PATH)"
LOADS: tuple[str, ...] = ("gguf",)
AXES: tuple[str, ...] = ("kv_cache",)
MAKES_REFERENCE = False
ENVIRONMENT: dict[str, str] = {}
BY_NAME = True
SERVER = True
BINARY = "llama-server"


# As in its own process.
Options = llamacpp.Options
unsupported, refuses, needs = llamacpp.unsupported, llamacpp.refuses, llamacpp.needs
serving_command = llamacpp.serving_command


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`. The package's is built for processors; another's is not asked."""
    return False


def load_engine() -> None:
    """See that there is anything to start. Raises `ImportError` if not."""
    if not shutil.which(BINARY):
        import xllamacpp  # noqa: F401


class Engine(Server):
    """A llama-server with a job's file."""

    def __init__(self, job: Job) -> None:
        options: Options = from_json(Options, job.options)
        threads, name, own = options.threads or len(os.sched_getaffinity(0)), alias(), shutil.which(BINARY)
        layers = max(0, options.gpu_layers)
        row = as_row(job, threads=threads, gpu_layers=layers, device="cpu")
        words = serving_command(job.artifact.path, row) or []
        program = [own] if own else [sys.executable, "-P", "-m", __name__]
        settings = {"device": "cuda" if layers else "cpu", "threads": threads}
        settings |= {"server": _version(own) if own else "xllamacpp"}
        super().__init__([*program, *words[1:], "--alias", name], name, settings)


def _version(program: str) -> str:
    told = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    return next(iter((told.stdout + told.stderr).splitlines()), "")[:200]


def main() -> None:
    """The package's server, until it is ended."""
    import xllamacpp as x

    words = argparse.ArgumentParser(BINARY)
    for name in ("model", "alias", "host", "cache-type-k", "cache-type-v", "flash-attn", "load-mode"):
        words.add_argument(f"--{name}")
    for name in ("ctx-size", "parallel", "threads", "port", "n-gpu-layers"):
        words.add_argument(f"--{name}", type=int)
    words.add_argument("--kv-unified", action="store_true")
    told = words.parse_args()
    params = x.CommonParams()
    params.model.path, params.model_alias = told.model, {told.alias}
    params.hostnames, params.port = [told.host], told.port
    params.n_ctx, params.n_parallel, params.kv_unified = told.ctx_size, told.parallel, told.kv_unified
    params.cpuparams.n_threads = told.threads
    if told.n_gpu_layers is not None:
        params.n_gpu_layers = told.n_gpu_layers
    if told.cache_type_k:
        params.cache_type_k = x.ggml_type[f"GGML_TYPE_{told.cache_type_k.upper()}"]
        params.cache_type_v = x.ggml_type[f"GGML_TYPE_{told.cache_type_v.upper()}"]
    if told.flash_attn:
        params.flash_attn_type = x.llama_flash_attn_type(1 if told.flash_attn == "on" else 0)
    if told.load_mode == "none":
        params.load_mode = x.llama_load_mode.LLAMA_LOAD_MODE_NONE
    server = x.Server(params)
    threading.Event().wait()
    del server


if __name__ == "__main__":
    main()
