"""The engines. A backend is one module and one line here; the recipe's word is the key.

`Backend` is what such a module says, readable by the parent without its engine, and `Engine` what it loads in a worker.
An engine speaks token ids only and holds no clock. `score` takes what the reducer is asked instead of yielding logits,
because vLLM's logits are born in a process of its own, where the reducer must be built.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast, runtime_checkable

from workbench.records import Artifact, Job, Quality, Row
from workbench.shape import EngineMemory, Sequences, Shape, Stored
from workbench.worker.scoring.reducer import Scoring

BACKENDS = {
    "transformers": "workbench.worker.backends.transformers",
    "vllm": "workbench.worker.backends.vllm",
    "llamacpp": "workbench.worker.backends.llamacpp",
    "mlx": "workbench.worker.backends.mlx",
    "llama-server": "workbench.worker.backends.llama_server",
    "vllm-serve": "workbench.worker.backends.vllm_serve",
    "llama-cpp-server": "workbench.worker.backends.llama_cpp_server",
}

if os.environ.get("WORKBENCH_FAKE_BACKEND"):
    # For tests of what a real engine cannot be made to do on demand; never offered to people.
    BACKENDS["fake"] = "workbench.worker.backends.fake"


class Engine(Protocol):
    """One engine with one model, which making it loads. Two methods more may be there: `prepare(batch, tokens)` makes
    room for so many sequences of so many tokens, and after `forget_peak()` the workspace is of what comes."""

    continuous: bool
    """Whether `serve` fills a free slot at once."""

    def score(self, asked: Scoring, progress: Callable[[int], object]) -> Quality:
        """What `Reducer(asked).result()` says of all windows; `progress` is told the index of each before it."""

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        """Yield the tokens gained by each sequence, step by step."""

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        """Yield the tokens gained by all in each step; so many for each prompt, so many prompts at once."""

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        """The likeliest continuation of each prompt, of at most so many tokens, without the first of `stop` and what
        follows it."""

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """Each id as the artifact's own vocabulary has it; None where it cannot be told."""

    def memory(self) -> dict[str, int]:
        """Bytes, as the engine itself states them: `weights`; `embedding`, the part of them that no step reads because
        rows are looked up in it; `kv_cache` at the workload's length; `workspace` where it knows; `kv_cache_reserved`
        if it reserves more."""

    def settings(self) -> dict[str, object]:
        """Dtype, threads, kernels: what it really runs with."""


@runtime_checkable
class Backend(Protocol):
    """What a backend's module says. Five more may be there: `LATER`, options that came after others and are left out
    of a row's key at their default (as methods have them); `MOST_SEQUENCES`, how many it takes at once at the most;
    `compile_for(job)`, which compiles what a job's kernels need before loading it is timed; `BY_NAME`, true of an
    engine that only recipes that name it get; and `SERVER`, true of one whose `Engine` is a server (`served.py`).

    An option's limits stand in its field's metadata (`ge`, `le`, as pydantic names them).
    """

    Options: type[Any]
    """The recipe's keys: a frozen dataclass."""
    AXES: tuple[str, ...]
    """Options that a recipe may give a list of values, each measured beside the others."""
    WORD: str
    """What people call it, where a recipe's word would not do."""
    MODULE: str
    """What to import to see whether the engine is there."""
    PACKAGES: tuple[str, ...]
    """Distributions whose versions identify it."""
    INSTALL: str
    """The command that installs it."""
    LOADS: tuple[str, ...]
    """Formats of artifacts."""
    ENVIRONMENT: dict[str, str]
    """Of its worker."""
    MAKES_REFERENCE: bool
    """Whether it may score the base for the divergence of all others: it computes in float32 on a CPU."""

    def unsupported(self, artifact: Artifact, cuda: bool) -> str | None:
        """Why it cannot load an artifact, or None."""

    def refuses(self, options: Any, form: str, cuda: bool) -> str | None:
        """Why these options cannot be had on this device, or with an artifact of format `form`; or None."""

    def needs(self, shape: Shape, form: str, stored: Stored, load: Sequences, options: Any, cuda: bool) -> EngineMemory:
        """What it needs for an artifact of format `form`."""

    def serving_command(self, path: str, row: Row) -> list[str] | None:
        """The words of the command that serves the artifact at `path` as the row's was measured: cache, context,
        sequences at once, dtype, devices. For this machine alone. None: the engine has no server that does."""

    def sees_cuda(self, payload: None, progress: object) -> bool:
        """Worker: whether the engine, as it is built and where it is, can compute on an NVIDIA GPU."""

    def load_engine(self) -> object:
        """Import the engine, so that importing is not counted as loading the model."""

    def Engine(self, job: Job) -> Engine:
        """The engine with a job's model."""


def packed_experts(artifact: Artifact) -> set[str]:
    """The types of experts that are packed one by one, such as `I4-g128`."""
    return {kind for name, kind in artifact.tensor_types.items() if ".experts." in name and "-" in kind}


def serve_in_groups(
    generate: Callable[[list[list[int]], int], Iterator[list[int]]],
    prompts: list[list[int]],
    new_tokens: list[int],
    slots: int,
) -> Iterator[int]:
    """Serving by an engine that only decodes prompts together: groups of `slots` prompts one after the other, each
    until its longest answer is done; yields how many sequences gained a token in each step."""
    for first in range(0, len(prompts), slots):
        wanted = new_tokens[first : first + slots]
        for step, _ in enumerate(generate(prompts[first : first + slots], max(wanted))):
            yield sum(step < most for most in wanted)


def backend_named(name: str) -> Backend:
    """The module of a backend."""
    module = importlib.import_module(BACKENDS[name])
    assert isinstance(module, Backend), f"{module.__name__} does not say all that `Backend` asks for"
    return cast(Backend, module)


def serving_command(row: Row, home: str = "$WORKBENCH_HOME") -> str | None:
    """The command that serves a row's artifact as it was measured; `home` is where `$WORKBENCH_HOME` in its path is."""
    if row.backend not in BACKENDS:
        return None
    path = row.artifact.path.replace("$WORKBENCH_HOME", home, 1)
    words = backend_named(row.backend).serving_command(path, row)
    # A shell reads a variable in double quotes alone.
    return shlex.join(words).replace("'$WORKBENCH_HOME/", '"$WORKBENCH_HOME"\'/') if words else None
