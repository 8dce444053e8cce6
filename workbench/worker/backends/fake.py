"""An engine that misbehaves on demand, for tests only (`WORKBENCH_FAKE_BACKEND=1`).

It hangs, dies, raises, prints garbage or returns NaN, which a real engine cannot be asked to do. Its logits are
seeded noise; the reduction, the isolation and everything around it are the real ones.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from workbench.records import Artifact, Job, Quality, Row, from_json
from workbench.shape import EngineMemory, Sequences, Shape, Stored
from workbench.worker.scoring.reducer import Scoring

WORD = "Fake"
MODULE = "torch"
PACKAGES: tuple[str, ...] = ("torch",)
INSTALL = "nothing; it is part of the tests"
LOADS: tuple[str, ...] = ("safetensors", "awq", "gptq", "gguf")
AXES: tuple[str, ...] = ()
MAKES_REFERENCE = False
ENVIRONMENT: dict[str, str] = {}


@dataclass(frozen=True)
class Options:
    """An engine that misbehaves."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    do: Literal["nothing", "hang", "die", "kill", "raise", "garbage", "nan", "one-nan", "memory"] = "nothing"
    """What goes wrong while loading."""
    only: str = ""
    """The variant that it goes wrong for; default: all."""


def unsupported(artifact: Artifact, cuda: bool) -> str | None:
    """It loads everything."""
    return None


def refuses(options: Options, form: str, cuda: bool) -> str | None:
    """It refuses nothing."""
    return None


def needs(shape: Shape, form: str, stored: Stored, load: Sequences, options: Options, cuda: bool) -> EngineMemory:
    """The file."""
    return EngineMemory(stored.disk_bytes, 0, 0, 0)


def serving_command(path: str, row: Row) -> None:
    """It serves nobody."""


def sees_cuda(payload: None, progress: object) -> bool:
    """Worker: see `Backend`."""
    return False


def load_engine() -> None:
    """There is none."""


class Clock:
    """A clock that goes on by what is slept, a little more or less, and by 0.1 ms each time it is read.

    `right` is the one that it is set by: what began before must not end before that.
    """

    def __init__(self, right: Callable[[], float]) -> None:
        self._time_s, self._chance = right(), random.Random(0)

    def now(self) -> float:
        self._time_s += 1e-4
        return self._time_s

    def sleep(self, seconds: float) -> None:
        self._time_s += seconds * self._chance.uniform(0.99, 1.01)


class Engine:
    """See `backends/__init__.py` for the contract."""

    def __init__(self, job: Job) -> None:
        options: Options = from_json(Options, job.options)
        if os.environ.get("WORKBENCH_FAKE_BROKEN"):
            raise RuntimeError("fake engine: broken since tonight")
        self._do = options.do if options.only in ("", job.artifact.variant) else "nothing"
        # Slower without a word in the recipe, as an engine's new version may be: in everything, or with one variant.
        self._step_s = 0.001 * float(os.environ.get("WORKBENCH_FAKE_SLOWER", "1"))
        if os.environ.get("WORKBENCH_FAKE_LIMPS") == job.artifact.variant:
            self._step_s *= 1.5
        self._sleep: Callable[[float], None] = time.sleep
        if os.environ.get("WORKBENCH_FAKE_CLOCK"):
            # What is measured is then the same on a busy machine: only the engine's steps turn this worker's clock.
            clock = Clock(time.perf_counter)
            time.perf_counter, self._sleep = clock.now, clock.sleep
        if self._do == "hang":
            time.sleep(3600)
        if self._do == "die":
            print("fake engine: assertion failed in layer 3", flush=True)
            os._exit(7)
        if self._do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._do == "raise":
            raise RuntimeError("fake engine: this model is not for me")
        if self._do == "garbage":
            sys.stdout.buffer.write(b'{"value": 1}\x00\xff\xfe not an answer\n' * 1000)
        if self._do == "memory":
            raise MemoryError("fake engine: cannot allocate 1 TiB")

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """Noise, or NaN, through the real reducer."""
        import torch

        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        noise = torch.Generator().manual_seed(0)
        for index, ids, first in asked.windows:
            progress(index)
            logits = torch.randn(len(ids) - first, asked.tokens.vocab_size, generator=noise)
            if self._do == "nan":
                logits[:] = float("nan")
            if self._do == "one-nan" and index == 0:
                logits[0, 0] = float("nan")
            reducer(index, first, logits)
        return reducer.result()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """A token a step for every prompt."""
        for _ in range(new_tokens):
            self._sleep(self._step_s)
            yield [1] * len(prompts)

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """What was asked, said again."""
        return [ids[:most] for ids, most in zip(prompts, new_tokens, strict=True)]

    continuous = True

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """A token a step for every request that has a slot; a free one is filled at once."""
        waiting, running = list(new_tokens), list[int]()
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            yield len(running)
            running = [left - 1 for left in running if left > 1]

    def spell(self, ids: list[int]) -> None:
        """It has no words."""

    def memory(self) -> dict[str, int]:
        """One byte."""
        return {"weights": 1}

    def settings(self) -> dict[str, object]:
        """A CPU, as everywhere."""
        return {"device": "cpu"}
