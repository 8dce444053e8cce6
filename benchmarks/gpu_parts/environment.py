"""What is installed, and what of the GPU a container may hide."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_parts import Finding, Place

LIMIT_S = 30
NEEDED = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17)}


def find(place: Place) -> Iterator[Finding]:
    """What is installed, and what of the GPU a container may hide."""
    import torch

    for package, least in NEEDED.items():
        version = installed(package)
        numbers = tuple(map(int, re.findall(r"\d+", version or "")[:2]))
        yield Finding(package, version or "not here", ">= " + ".".join(map(str, least)), numbers >= least)
    for package in ("vllm", "llama-cpp-python", "gptqmodel", "nvidia-ml-py"):
        yield Finding(package, installed(package) or "not here")
    if os.environ.get("WORKBENCH_PYTHON_VLLM"):
        yield Finding("vLLM's own interpreter", os.environ["WORKBENCH_PYTHON_VLLM"])
    yield Finding("python, CUDA of torch", f"{sys.version.split()[0]}, {torch.version.cuda}")
    yield Finding("nvcc", shutil.which("nvcc") or "not on PATH")
    yield Finding("in a container", "yes" if Path("/.dockerenv").exists() else "not of Docker's")
    place.results.mkdir(parents=True, exist_ok=True)
    yield Finding("results can be written", str(place.results), "yes", os.access(place.results, os.W_OK))
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        free, whole = torch.cuda.mem_get_info()
        yield Finding(
            properties.name,
            f"{whole / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors, "
            f"sm_{properties.major}{properties.minor}",
        )
        yield Finding("free of it", f"{100 * free / whole:.0f} %", "> 90 %: nobody else is on it", free / whole > 0.9)
        yield seen_by_nvml()
        yield offload()


def installed(package: str) -> str | None:
    """The version of a package here."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def seen_by_nvml() -> Finding:
    """Whether NVML names this process by the id that it has here: in a container without the host's ids it does not."""
    import torch

    what, goal = "NVML knows this process", "yes (a container needs --pid host)"
    if not importlib.util.find_spec("pynvml"):
        return Finding(what, "nvidia-ml-py is not here")
    import pynvml

    used = torch.ones(1, device="cuda")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except pynvml.NVMLError as error:
        return Finding(what, f"{error}", goal, False)
    del used
    return Finding(what, "yes" if os.getpid() in pids else f"no, it names {sorted(pids)}", goal, os.getpid() in pids)


def offload() -> Finding:
    """Whether llama.cpp, imported as the workbench imports it, can use the GPU."""
    what = "llama.cpp can use the GPU"
    if not importlib.util.find_spec("llama_cpp"):
        return Finding(what, "not here")
    program = "import llama_cpp; print(llama_cpp.llama_supports_gpu_offload())"
    answer = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    words = (answer.stdout + answer.stderr).strip().splitlines()
    return Finding(what, words[-1] if words else "no answer", "True", words[-1:] == ["True"])
