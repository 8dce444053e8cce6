"""What an engine can use of this machine: asked in its own interpreter, which alone knows how it was built."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import lru_cache

from workbench.errors import UserError, WorkFailed
from workbench.home import interpreter
from workbench.machine.identity import has_cuda
from workbench.machine.work import ask
from workbench.worker.backends import BACKENDS

LIMIT_S = 300.0
"""Seconds for an engine to be imported and asked."""


@lru_cache(maxsize=16)
def uses_gpu(backend: str) -> bool:
    """Whether a backend computes on an NVIDIA GPU here: there is one, and the engine that is installed is built for it.

    Where there is no GPU nothing is started. An engine that cannot be asked uses none; what ails it is told when it
    is to work.
    """
    if not has_cuda():
        return False
    python = interpreter(backend, sys.executable)
    try:
        return bool(ask(f"{BACKENDS[backend]}:sees_cuda", None, python=python, limit_s=LIMIT_S))
    except (UserError, WorkFailed):
        return False


def crowded(backend: str, options: Mapping[str, object]) -> str | None:
    """What to tell of a backend that is to use more threads than it may have processors; None if there is nothing."""
    threads, here = options.get("threads"), len(os.sched_getaffinity(0))
    if not isinstance(threads, int) or threads <= here:
        return None
    return f"{backend}: {threads} threads, and the program may use {here} processors here: it will be slower for it"


def idle_gpu(backend: str) -> str | None:
    """What to tell of a GPU that is here and that a backend's engine cannot use; None if there is nothing to tell."""
    if not has_cuda() or uses_gpu(backend):
        return None
    return (
        f"{backend} is measured on the processor: what {interpreter(backend, sys.executable)} has of it is not built "
        "for the GPU that is here. `make gpu` sets up what is"
    )
