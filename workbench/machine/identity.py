"""What this machine is, and which engines it has: the part of a row that says where a number was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import psutil

from workbench import __version__
from workbench.gpus import driver_version, gpus, installed
from workbench.records import Accelerator, Machine


@lru_cache(maxsize=1)
def machine() -> Machine:
    """Processor, memory, GPUs, system; `name` is the folder its results go to, the same for all with such hardware."""
    accelerators = [Accelerator(gpu.name, gpu.memory_bytes or 0) for gpu in installed()]
    found = Machine(
        cpu=_cpu_model(),
        threads=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpus=accelerators,
        driver=driver_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
    )
    return replace(found, name=found.hardware)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", " ", line.split(":", 1)[1])
                return " ".join(model.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_cuda() -> bool:
    """Whether an NVIDIA GPU is at hand that `CUDA_VISIBLE_DEVICES` does not hide."""
    return bool(gpus())


@lru_cache(maxsize=32)
def versions(packages: tuple[str, ...], python: str = sys.executable) -> dict[str, str]:
    """Versions of those packages that an interpreter has installed; absent ones are left out."""
    if Path(python) == Path(sys.executable):
        return _installed(packages)
    script = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    try:
        answer = subprocess.run(
            [python, "-P", "-c", script, *packages], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(json.loads(answer.stdout))


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def program() -> dict[str, str]:
    """This program's version, and its commit where it runs from a checkout."""
    found = {"workbench": __version__}
    folder = Path(__file__).resolve().parents[2]
    if (folder / ".git").exists():
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
            found["commit"] = answer.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return found
