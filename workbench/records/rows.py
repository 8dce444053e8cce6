"""What a row of results is made of: the program's nouns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from workbench.records.limits import (
    Count,
    Moment,
    Name,
    Place,
    Positive,
    Seconds,
    Size,
    Timed,
    Title,
    Whole,
    limit,
)
from workbench.records.machine import Conditions, Machine
from workbench.records.scores import Answers, Quality, check_quality
from workbench.records.serving import Serving, longest_mixed

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
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class CarriedVariant(Variant):
    """Another variant in another format, the same weights; `method` and `options` are that variant's."""

    source: str = ""
    """Its name."""
    form: str = ""
    """The format."""


@dataclass(frozen=True)
class Artifact:
    """The files a method wrote, and what is true of them."""

    variant: Name
    method: Name
    format: str
    """What a backend must be able to load: `safetensors`, `gguf`, `awq`, `gptq`, `compressed-tensors` and so on."""
    path: Place
    """A Hugging Face directory, or a `.gguf` file."""
    digest: str
    """Digest of everything that determined the bytes: base, method, options, calibration, versions."""
    disk_bytes: Count
    """All weight tensors as stored, without headers; tied embeddings once."""
    parameters: Count
    """The base's weights, tied embeddings once."""
    tensor_types: dict[str, str] = field(default_factory=dict)
    """The type each tensor really got, by its name in the file."""
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("source", "options", "versions", "encoder", "carried"):
            if not isinstance(self.provenance.get(name) or {}, dict):
                raise ValueError(f"provenance.{name} is no object")
        source = self.provenance.get("source") or {}
        for name in ("hub", "package"):
            if not isinstance(source.get(name, ""), str | None):
                raise ValueError(f"provenance.source.{name} is no name")

    @property
    def bits_per_weight(self) -> float | None:
        """Bytes of all weight tensors x 8 over parameters (the program's one convention)."""
        return self.disk_bytes * 8 / self.parameters if self.parameters else None


@dataclass(frozen=True)
class Workload:
    """What is run for speed: prompts of each length in batches of the first size, and the first length in batches
    of each further size. The first length in the first size is what tables show."""

    prompt_tokens: Annotated[list[Positive], limit(min_length=1)] = field(default_factory=lambda: [512])
    """Prompt lengths: prefill at that length, decode at that depth."""
    new_tokens: Positive = 64
    batches: Annotated[list[Positive], limit(min_length=1)] = field(default_factory=lambda: [1])
    """Sequences at once."""
    repeats: Count = 3
    warmup: Count = 1
    seed: Whole = 0
    requests: Count = 0
    """Requests a sequence slot that are also served with continuous batching, at every batch size; 0: none."""

    @property
    def longest_answer(self) -> int:
        """New tokens of the longest request that is served (`worker/measure/timing.py`), or timed alone."""
        return longest_mixed(self.new_tokens) if self.requests else self.new_tokens

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

    name: Name
    path: Place
    """A JSON file `{"windows": [[id, ...], ...], "score_from": [position, ...]}`."""
    digest: str
    window: Positive
    score: str
    """The convention: `second-half`, `all` or `strided`."""
    windows: Count
    scored_tokens: Count
    scored_bytes: Count | None = None
    """UTF-8 bytes of the text the scored tokens spell, for bits a byte."""


@dataclass(frozen=True)
class Task:
    """Prompts with expected answers, tokenized once a recipe and the same for every engine."""

    name: Name
    path: Place
    """A JSON file of token ids as `worker/tokens/tasks.py` writes it."""
    digest: str
    items: Count | None
    """How many; None where only the harness knows."""
    longest: Count
    """Tokens of the longest prompt with its answer."""
    harness: bool = False
    """Whether it is one of lm-evaluation-harness's own tasks."""


@dataclass(frozen=True)
class Job:
    """One artifact in one engine: what a worker is asked to measure."""

    base: str
    artifact: Artifact
    backend: str
    options: dict[str, object]
    workload: Workload
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name, in the recipe's order."""
    references: dict[str, str] = field(default_factory=dict)
    """By set, the path of the compact record of the base's distributions (`worker/scoring/reducer.py`), for the
    divergence."""
    base_digest: str = ""
    """Digest of the base that the references must be of."""
    tasks: dict[str, Task] = field(default_factory=dict)
    sliding_window: Count = 0
    """Tokens that the base's windowed layers look back; 0 if it has none."""
    rounds: Count = 1
    """In how many rounds the repeats are timed; between them the worker waits to be resumed."""

    @property
    def longest_window(self) -> int:
        """The most tokens that an engine has to take at once for what is scored."""
        return _longest(self.evaluations, self.tasks)


def _longest(evaluations: dict[str, Evaluation], tasks: dict[str, Task]) -> int:
    lengths = [each.window for each in evaluations.values()] + [task.longest for task in tasks.values()]
    return max(lengths, default=0)


@dataclass(frozen=True)
class Speed:
    """Raw samples of one workload point: one entry a repeat."""

    prompt_tokens: Positive
    new_tokens: Positive
    batch: Positive
    first_token_s: list[Timed]
    """From submitting the prompts to the first new token of all sequences."""
    step_s: list[list[Timed]]
    """Seconds of each decoding step after the first token, a list a repeat."""
    step_tokens: list[list[Count]]
    """Tokens gained in each of those steps over the whole batch, a list a repeat."""
    energy_j: list[Size | None] = field(default_factory=list)
    """Joules in each repeat, prompt and answer, over the counters that the settings name (`energy_of`); None without
    any."""
    rounds: list[Count] = field(default_factory=list)
    """How many repeats each round had: between two rounds of a job, others were at work. Empty: there was one."""

    def __post_init__(self) -> None:
        repeats = len(self.first_token_s)
        _check_repeats(self.rounds, repeats, len(self.step_s), len(self.step_tokens), len(self.energy_j) or repeats)
        if [*map(len, self.step_s)] != [*map(len, self.step_tokens)]:
            raise ValueError("a repeat has not a time for each step")


@dataclass(frozen=True)
class Served:
    """Raw samples of requests served together: one entry of `seconds` a repeat."""

    slots: Positive
    """Sequences at once."""
    prompt_tokens: Positive
    new_tokens: list[Count]
    """New tokens of each request."""
    seconds: list[Timed]
    """From the first request to the last one's end."""
    continuous: bool
    """Whether a free slot takes the next request at once; else a group ends before the next begins."""
    rounds: list[Count] = field(default_factory=list)
    """As in `Speed`."""

    def __post_init__(self) -> None:
        _check_repeats(self.rounds, len(self.seconds))


def _check_repeats(rounds: list[int], *lengths: int) -> None:
    """Raises `ValueError` where rounds and lists of samples are not of the same repeats."""
    if {*lengths} != {sum(rounds) if rounds else lengths[0]} or (0 in rounds and any(lengths)):
        raise ValueError("samples of different numbers of repeats")


@dataclass(frozen=True)
class Measurement:
    """What a worker found out, and what the parent saw of its processes."""

    device: str
    """`cpu` or the accelerator's name."""
    load_s: Seconds | None = None
    speeds: list[Speed] = field(default_factory=list)
    qualities: dict[str, Quality] = field(default_factory=dict)
    """By evaluation set, as the reducer's `compact` gives it."""
    memory: dict[str, Count] = field(default_factory=dict)
    """Bytes: what the engine itself says (`weights`, `kv_cache`, ...) and, from the parent, `peak_*`."""
    settings: dict[str, object] = field(default_factory=dict)
    """Dtype, threads, kernel: what the engine really ran with."""
    warnings: list[str] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    conditions: Conditions = field(default_factory=lambda: Conditions())
    tasks: dict[str, Answers] = field(default_factory=dict)
    serving: Serving | None = None
    """Of a server: what it answered under load."""

    def __post_init__(self) -> None:
        for name, quality in self.qualities.items():
            check_quality(name, quality)


@dataclass(frozen=True)
class Row:
    """One line of a results file: everything needed to read it alone, years later."""

    key: Title
    base: Title
    recipe: Name
    recipe_digest: str
    artifact: Artifact
    backend: Name
    workload: Workload
    measurement: Measurement | None
    machine: Machine
    versions: dict[str, str]
    started_at: Moment
    duration_s: Seconds
    options: dict[str, object] = field(default_factory=dict)
    evaluations: dict[Name, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name; the first is what tables show."""
    tasks: dict[Name, Task] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    unsupported: str | None = None
    """The reason why this pair cannot run at all; not a failure."""
    schema_version: Count = SCHEMA_VERSION
    measurement_version: Count = MEASUREMENT_VERSION
    base_types: list[str] = field(default_factory=list)
    """Quantized types that the base's own weights were stored in before (`PreparedBase.quantized_types`)."""
    place: Count = 0
    """Where the pair stands in its recipe; jobs run in another order."""

    @property
    def device(self) -> str | None:
        """Where it ran; of a job that never got so far, where it was to run, if its options say."""
        wanted = self.options.get("device")
        return self.measurement.device if self.measurement else wanted if isinstance(wanted, str) else None

    @property
    def longest_window(self) -> int:
        """The most tokens that its engine took at once for what was scored."""
        return _longest(self.evaluations, self.tasks)

    @property
    def evaluation(self) -> Evaluation | None:
        """The first evaluation set."""
        return next(iter(self.evaluations.values()), None)

    @property
    def quality(self) -> Quality | None:
        """What was measured on the first evaluation set."""
        found = self.measurement.qualities if self.measurement else {}
        return found.get(next(iter(self.evaluations), ""))
