"""The program's nouns as frozen dataclasses, and their JSON form.

Standard library only: these cross from the parent to workers that may run under another interpreter.
Units are SI and stand in the names (`load_s`, `disk_bytes`). Raw samples are kept; a mean or an
interval is a view (`report/metrics.py`). A pydantic model would check more, but would have to be
installed wherever an engine is; recipes, where people mistype, are checked in `recipe.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2
"""Version of a stored row's form. Raise it when a field changes, and teach `report/migrate.py` to read the old one."""

MEASUREMENT_VERSION = 2
"""Version of the way things are measured. Rows of different versions are never put side by side."""

REFERENCE_VERSION = 2
"""Version of the file that keeps the base's distributions (`worker/scoring/reducer.py`); another version is refused."""


@dataclass(frozen=True)
class Variant:
    """One form of the base: what to make, not yet made."""

    name: str
    method: str
    """A key of `METHODS`, or `base` for the unquantized model."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """The files a method wrote, and what is true of them."""

    variant: str
    method: str
    format: str
    """What a backend must be able to load: `safetensors`, `gguf`, `awq`, `gptq`."""
    path: str
    """A Hugging Face directory, or a `.gguf` file."""
    digest: str
    """Of everything that determined the bytes: base, method, options, calibration, versions."""
    disk_bytes: int
    """All weight tensors as stored, without headers; tied embeddings once."""
    parameters: int
    """Of the base, tied embeddings once."""
    tensor_types: dict[str, str] = field(default_factory=dict)
    """The type each tensor really got, by its name in the file."""
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float | None:
        """Bytes of all weight tensors x 8 over parameters (the program's one convention)."""
        return self.disk_bytes * 8 / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Workload:
    """What is run for speed: prompts of each length in batches of the first size, and the first length in batches
    of each further size. The first length in the first size is what tables show."""

    prompt_tokens: list[int] = field(default_factory=lambda: [512])
    """Prompt lengths: prefill at that length, decode at that depth."""
    new_tokens: int = 64
    batches: list[int] = field(default_factory=lambda: [1])
    """Sequences at once."""
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    requests: int = 0
    """Requests a sequence slot that are also served with continuous batching, at every batch size; 0: none."""

    @property
    def longest_answer(self) -> int:
        """New tokens of the longest request that is served (`worker/measure/timing.py`), or timed alone."""
        return max(1, self.new_tokens * 3 // 2) if self.requests else self.new_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, prompt and answer."""
        return max(max(self.prompt_tokens) + self.new_tokens, self.prompt_tokens[0] + self.longest_answer)

    @property
    def most_tokens(self) -> int:
        """Tokens of all sequences that are in memory at once, at the largest point."""
        first = self.prompt_tokens[0] + self.longest_answer
        return max(self.batches[0] * (max(self.prompt_tokens) + self.new_tokens), max(self.batches) * first)

    @property
    def points(self) -> list[tuple[int, int]]:
        """(prompt tokens, batch) of everything that is timed, in order."""
        lengths, sizes = self.prompt_tokens, self.batches
        return [(length, sizes[0]) for length in lengths] + [(lengths[0], size) for size in sizes[1:]]


@dataclass(frozen=True)
class Evaluation:
    """The tokens a variant is scored on, made once a recipe and the same for every engine."""

    name: str
    path: str
    """A JSON file `{"windows": [[id, ...], ...], "score_from": [position, ...]}`."""
    digest: str
    window: int
    score: str
    """The convention: `second-half`, `all` or `strided`."""
    windows: int
    scored_tokens: int
    scored_bytes: int | None = None
    """UTF-8 bytes of the text the scored tokens spell, for bits a byte."""


@dataclass(frozen=True)
class Task:
    """Prompts with expected answers, tokenized once a recipe and the same for every engine."""

    name: str
    path: str
    """A JSON file of token ids as `worker/tokens/tasks.py` writes it."""
    digest: str
    items: int | None
    """How many; None where only the harness knows."""
    longest: int
    """Tokens of the longest prompt with its answer."""
    harness: bool = False
    """Whether it is one of lm-evaluation-harness's own tasks."""


@dataclass(frozen=True)
class Job:
    """One artifact in one engine: what a worker is asked to measure."""

    base: str
    artifact: Artifact
    backend: str
    options: dict[str, Any]
    workload: Workload
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name, in the recipe's order."""
    references: dict[str, str] = field(default_factory=dict)
    """By set, the path of the compact record of the base's distributions (`worker/scoring/reducer.py`), for the
    divergence."""
    base_digest: str = ""
    """Digest of the base that the references must be of."""
    tasks: dict[str, Task] = field(default_factory=dict)
    rounds: int = 1
    """In how many rounds the repeats are timed; between them the worker waits to be resumed."""

    @property
    def longest_window(self) -> int:
        """The most tokens that an engine has to take at once for what is scored."""
        windows = [each.window for each in self.evaluations.values()]
        return max([*windows, *(task.longest for task in self.tasks.values())], default=0)


@dataclass(frozen=True)
class Speed:
    """Raw samples of one workload point: one entry a repeat."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    first_token_s: list[float]
    """From submitting the prompts to the first new token of all sequences."""
    step_s: list[list[float]]
    """Seconds of each decoding step after the first token, a list a repeat."""
    step_tokens: list[list[int]]
    """Tokens gained in each of those steps over the whole batch, a list a repeat."""
    energy_j: list[float | None] = field(default_factory=list)
    """Joules of the whole machine in each repeat, prompt and answer; None where nothing counts them."""
    rounds: list[int] = field(default_factory=list)
    """How many repeats each round had: between two rounds of a job, others were at work. Empty: there was one."""


@dataclass(frozen=True)
class Served:
    """Raw samples of requests served together: one entry of `seconds` a repeat."""

    slots: int
    """Sequences at once."""
    prompt_tokens: int
    new_tokens: list[int]
    """Of each request."""
    seconds: list[float]
    """From the first request to the last one's end."""
    continuous: bool
    """Whether a free slot takes the next request at once; else a group ends before the next begins."""
    rounds: list[int] = field(default_factory=list)
    """As in `Speed`."""


@dataclass(frozen=True)
class Measurement:
    """What a worker found out, and what the parent saw of its processes."""

    device: str
    """`cpu` or the accelerator's name."""
    load_s: float | None = None
    speeds: list[Speed] = field(default_factory=list)
    qualities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By evaluation set, per window sums and counts as `worker/scoring/reducer.py` defines them, in the form that its
    `compact` gives."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Bytes: what the engine itself says (`weights`, `kv_cache`, ...) and, from the parent, `peak_*`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Dtype, threads, kernel: what the engine really ran with."""
    warnings: list[str] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    """What the machine did meanwhile: load of others, clocks, throttling (`machine/monitor.py`), `probe_s`, how much of
    the files was in the page cache."""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `worker/tokens/tasks.py` says of each task: right or wrong for every item, in the order of its file."""


@dataclass(frozen=True)
class Row:
    """One line of a results file: everything needed to read it alone, years later."""

    key: str
    base: str
    recipe: str
    recipe_digest: str
    artifact: Artifact
    backend: str
    workload: Workload
    measurement: Measurement | None
    machine: dict[str, Any]
    versions: dict[str, str]
    started_at: str
    """RFC 3339, UTC."""
    duration_s: float
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name; the first is what tables show."""
    tasks: dict[str, Task] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    unsupported: str | None = None
    """The reason why this pair cannot run at all; not a failure."""
    schema_version: int = SCHEMA_VERSION
    measurement_version: int = MEASUREMENT_VERSION
    place: int = 0
    """Where the pair stands in its recipe; jobs run in another order."""

    @property
    def evaluation(self) -> Evaluation | None:
        """The first evaluation set."""
        return next(iter(self.evaluations.values()), None)

    @property
    def quality(self) -> dict[str, Any] | None:
        """What was measured on the first evaluation set."""
        found = self.measurement.qualities if self.measurement else {}
        return found.get(next(iter(self.evaluations), ""))


def digest(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(value: Any) -> Any:
    """A record (or a container of them) as plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The inverse of `to_json` for a type built of the records above.

    Unknown keys are dropped, so that a row with fields added later can still be read; a missing field
    without a default raises `TypeError`.
    """
    reader = _reader(kind)
    return value if reader is None else reader(value)


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any] | None:
    """How a type is read; None where its JSON is it already. Made once a type: a history has 10,000 rows."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        fields = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(kind)}

        def record(value: Any) -> Any:
            known = {name: item for name, item in value.items() if name in fields}
            for name, item in known.items():
                reader = fields[name]
                if reader is not None:
                    known[name] = reader(item)
            return kind(**known)

        return record
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = _reader(next(a for a in arguments if a is not type(None)))
        return None if inner is None else lambda value: None if value is None else inner(value)
    if origin not in (list, dict):
        return None
    item_of = _reader(arguments[-1])
    if origin is list:
        return list if item_of is None else lambda value: [item_of(item) for item in value]
    return dict if item_of is None else lambda value: {key: item_of(item) for key, item in value.items()}
