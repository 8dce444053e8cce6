"""A recipe's fixed parts as pydantic models: what may stand in each, and what each key means.

A key's docstring is its description, here and in the options of methods and engines: editors show it, by the schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from workbench.errors import short
from workbench.recipe.sources import Base, Source, Strict, absolute, exactly_one, one_of
from workbench.recipe.words import (
    MOST_CUT,
    MOST_TOKENS,
    File,
    Name,
    Seconds,
    Seed,
    Tokens,
    Window,
    Windows,
    Word,
    twin,
)
from workbench.records import Workload
from workbench.worker.tokens.conventions import CONVENTIONS, DEFAULT

if TYPE_CHECKING:
    Score = str
else:
    Score = Literal[tuple(CONVENTIONS)]


class Cut(Strict):
    """`windows` windows of `window` tokens of a text."""

    source: Source
    """Where the text is."""
    window: Window = 512
    """Tokens of a window, at most the model's context."""
    windows: Windows
    """How many windows are taken."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.window * self.windows > MOST_CUT:
            raise ValueError(
                f"`windows` times `window`: {MOST_CUT:,} tokens at most, not {self.window * self.windows:,}"
            )
        return self


class EvaluationModel(Cut):
    """Tokens for perplexity, scored by a convention."""

    name: Name | None = None
    """What the set is called in tables (default `evaluation`)."""
    windows: Windows = 20
    """How many windows are scored, from the text's beginning."""
    score: Score = DEFAULT
    """Which tokens of a window are scored: its `second-half`, as llama.cpp does; `all`, as papers do; `strided`: of
    windows that overlap, the last `stride` tokens."""
    stride: Tokens | None = None
    """How many tokens further each window begins, for `score: strided`; less than `window`."""

    @model_validator(mode="after")
    def _strided(self) -> Self:
        takes_stride = CONVENTIONS[self.score].stride
        if takes_stride and not (self.stride and self.stride < self.window):
            raise ValueError(f"`score: {self.score}` needs a `stride` from 1 to {self.window - 1}")
        if not takes_stride and self.stride is not None:
            takers = " or ".join(f"`score: {name}`" for name, each in CONVENTIONS.items() if each.stride)
            raise ValueError(f"a `stride` belongs to {takers}")
        return self


_WORD_OR_NUMBER = Discriminator(lambda value: "word" if isinstance(value, str) else "number")
_Number = Annotated[int, Field(ge=1, le=64), Tag("number")]
Devices = Annotated[Annotated[Literal["auto"], Tag("word")] | _Number, _WORD_OR_NUMBER]


class Calibration(Cut):
    """Tokens that methods may look at; never the evaluation's unless `allow_overlap` says so."""

    windows: Windows = 32
    """How many windows are drawn, at random."""
    seed: Seed = 0
    """The seed of that draw."""
    allow_overlap: bool = False
    """Let calibration and evaluation share passages of text, which flatters every method that calibrates."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the pass multiplies matrices in. `auto`: float32 where the recipe makes an importance matrix, whose smallest
    entries bfloat16 would move by a tenth; else bfloat16 where the processor has it, in two thirds of the time."""
    # Left out at its default, as `adapter` is.
    devices: Annotated[Devices, Field(exclude_if=lambda value: value == "auto")] = "auto"
    """Over how many devices the windows are shared out, a process each. `auto`: every GPU that is visible; on a CPU one
    process. A number on a CPU: so many processes, each with its part of the threads."""


class TaskModel(Strict):
    """Prompts with expected answers: a file of one's own, or a task of lm-evaluation-harness."""

    model_config = ConfigDict(json_schema_extra=one_of("file", "lm_eval"))

    file: File | None = None
    """YAML, JSON or JSONL, relative to the recipe; `recipes/tasks/everyday.yaml` shows every form."""
    lm_eval: Word | None = None
    """The name of a task that the harness knows."""
    include: File | None = None
    """A folder of the harness's own YAML files, relative to the recipe."""
    shots: int | None = Field(default=None, ge=0, le=1000)
    """Solved examples before each question of `lm_eval` (default: the task's own)."""
    limit: int | None = Field(default=None, ge=1, le=10**6)
    """Only the first so many items."""
    new_tokens: Tokens | None = None
    """The longest answer that is let grow, where an item says nothing else (default 32)."""
    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message; a server puts it into its own."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        exactly_one(self, ("file", "lm_eval"))
        theirs = [name for name in ("include", "shots") if getattr(self, name) is not None]
        if self.file and theirs:
            raise ValueError(f"`{theirs[0]}` belongs to `lm_eval`")
        if self.lm_eval and (self.new_tokens or self.chat):
            raise ValueError(f"`{'chat' if self.chat else 'new_tokens'}` belongs to `file`")
        return self

    def resolved(self, folder: Path) -> dict[str, Any]:
        """As `worker/tokens/tasks.py` wants it, with paths made absolute against the recipe's folder."""
        given = {name: value for name, value in self.model_dump().items() if value not in (None, False)}
        return given | {name: str(absolute(given[name], folder)) for name in ("file", "include") if name in given}


class Limits(Strict):
    """Seconds after which a worker is stopped and its job becomes a failed row."""

    quantize_s: Seconds = 6 * 3600
    """Seconds for the base, the calibration pass and each variant (default 6 hours)."""
    profile_s: Seconds = 3600
    """Seconds for each job, loading included (default 1 hour)."""


# Told apart before they are checked, so that a wrong number in a list is not answered with "not a number".
_KIND = Discriminator(lambda value: "several" if isinstance(value, list) else "one")
_List = Field(min_length=1, max_length=16)
Batch = Annotated[int, Field(ge=1, le=4096)]
SeveralTokens = Annotated[Annotated[Tokens, Tag("one")] | Annotated[list[Tokens], _List, Tag("several")], _KIND]
Batches = Annotated[Annotated[Batch, Tag("one")] | Annotated[list[Batch], _List, Tag("several")], _KIND]
"""A number, or a list of numbers."""


def _several(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


class WorkloadModel(Strict):
    """What is run for speed. Of a list the first entry is what tables show; the others are measured beside it."""

    prompt_tokens: SeveralTokens = 512
    """Length of a prompt, or a list of lengths."""
    new_tokens: int = Field(default=64, ge=2, le=MOST_TOKENS)
    """Tokens that are generated after each prompt."""
    batch: Batches = 1
    """Sequences at once, or a list of such numbers."""
    repeats: int = Field(default=3, ge=1, le=1000)
    """How often each speed is measured; more make its interval narrower."""
    warmup: int = Field(default=1, ge=0, le=1000)
    """Repeats before those that count."""
    seed: Seed = 0
    """The seed of where prompts are cut from the evaluation's text, and of the order of jobs."""
    requests: int = Field(default=0, ge=0, le=1000)
    """Served requests a slot, with continuous batching, for each `batch` (default: none)."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("prompt_tokens", "batch"):
            values = _several(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` names a value twice")
        return self

    def workload(self) -> Workload:
        """As the rest of the program has it."""
        given = self.model_dump(exclude={"prompt_tokens", "batch"})
        return Workload(prompt_tokens=_several(self.prompt_tokens), batches=_several(self.batch), **given)


class Document(Strict):
    """The fixed part of a recipe; variants and backends are checked against their own modules."""

    name: Name | None = None
    """What the recipe is called in tables and rows (default: the file's name)."""
    model: Name | None = None
    """What the model is called in tables and file names (default: the base's name)."""
    base: Base
    """The unquantized model that every variant is made from."""
    calibration: Calibration | None = None
    """The text that AWQ, GPTQ and importance matrices look at; needed if any variant does."""
    evaluation: EvaluationModel | None = None
    """The text for perplexity and divergence: one set, or a mapping from names to sets. Without it, speed only."""
    tasks: dict[Name, TaskModel] = Field(default_factory=dict, max_length=100)
    """Tasks by name; each adds a column of accuracy."""
    workload: WorkloadModel = WorkloadModel()
    """What is run for speed and memory."""
    limits: Limits = Limits()
    """How long work may take."""
    machines: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list, max_length=100)
    """With --on: on which machines of the cluster, by kind or label; every job runs on one of each."""

    @field_validator("tasks", mode="after")
    @classmethod
    def _apart(cls, value: dict[str, TaskModel]) -> dict[str, TaskModel]:
        for number, name in enumerate(value):
            if other := twin(name, [*value][:number]):
                raise ValueError(f"'{short(name)}' and '{short(other)}' would be one file: name them apart")
        return value
