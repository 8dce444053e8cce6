"""`workbench doctor`: what this machine can do, and what to install for the rest."""

from __future__ import annotations

import shutil
import subprocess
import sys

from workbench.engines import idle_gpu, uses_gpu
from workbench.home import home, interpreter
from workbench.machine.identity import machine, versions
from workbench.records import Artifact
from workbench.worker.backends import BACKENDS, backend_named
from workbench.worker.methods import METHODS, method_named

IMPORT_LIMIT_S = 180


def report() -> int:
    """Print the state of the machine and its engines; 1 if no engine works."""
    here = machine()
    print(f"machine    {here.name}")
    print(f"           {here.cpu}, {here.threads} threads, {here.memory_bytes / 2**30:.0f} GiB")
    print(f"           {here.system}")
    for gpu in here.gpus:
        print(f"           {gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, driver {here.driver}")
    if not here.gpus:
        print("           no NVIDIA GPU")
    folder = home()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"cache      {folder}, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free")
    working = 0
    backends = {name: backend_named(name) for name in BACKENDS}
    forms = [form for backend in backends.values() for form in backend.LOADS]
    forms += [form for name in METHODS for form in method_named(name).WRITES]
    for name, backend in backends.items():
        python = interpreter(name, sys.executable)
        found = versions(backend.PACKAGES, python)
        problem = _import_problem(python, backend.MODULE)
        if problem:
            print(f"{name:10} not usable: {problem}. Install it with: {backend.INSTALL}")
            continue
        working += 1
        print(f"{name:10} {', '.join(f'{package} {version}' for package, version in found.items())}  ({python})")
        if told := idle_gpu(name):
            print(f"           {told}")
        for form in dict.fromkeys(forms):
            reason = backend.unsupported(Artifact("", "", form, "", "", 0, 0), uses_gpu(name))
            print(f"           {form:12} {'loads' if reason is None else reason}")
    return 0 if working else 1


def _import_problem(python: str, module: str) -> str | None:
    """Why an engine cannot be imported, in its last words; None if it can."""
    try:
        answer = subprocess.run(
            [python, "-P", "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_LIMIT_S
        )
    except OSError as error:
        return f"{python} cannot be started ({error.strerror})"
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {IMPORT_LIMIT_S} s"
    if answer.returncode == 0:
        return None
    return (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
