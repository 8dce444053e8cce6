"""A recipe: YAML read into validated, frozen objects. Loading one touches nothing but the file itself.

Keys are strict, and every name that a person can mistype is answered with the nearest known one. The options
of a method or backend are the dataclass in its own module, so a new one needs no change here. Values are
validated as JSON in pydantic's strict mode: "4" is not 4.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from workbench.errors import UserError, did_you_mean, unknown
from workbench.records import Variant, Workload, digest, to_json
from workbench.worker.backends import BACKENDS
from workbench.worker.methods import METHODS

MAX_BYTES = 200_000
MAX_ALIASES = 20
"""A YAML bomb needs nested aliases; people need none or a few."""
MAX_DEPTH = 32
"""The parser's time grows with the square of the depth: 100,000 brackets take minutes."""
UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic's names for it, in models and in dataclasses."""


Word = Annotated[str, Field(min_length=1)]
NAME = r"^[A-Za-z0-9][\w.-]*$"
"""What a person may call a recipe, a model, an evaluation set or a task."""


class Strict(BaseModel):
    """Unknown keys are errors; objects do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _exactly_one(record: BaseModel, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(record, name) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise ValueError(f"give exactly one of {', '.join(names)} ({found})")


def _one_of(*names: str) -> dict[str, Any]:
    """The same for editors; a package's `file` is not a source of its own."""
    forms = [{"required": [name]} for name in names if name != "file"]
    alone = {"required": ["file"], "not": {"required": ["package"]}}
    return {"oneOf": [*forms, alone] if "file" in names else forms}


class Equivalent(Strict):
    """An exact, function-preserving rewrite of a Llama: rescaled off its grid, zero-padded to `hidden`."""

    hidden: int = Field(gt=0)
    seed: int = 0


class Base(Strict):
    """Where the unquantized model comes from: exactly one of hub, path, package, config."""

    model_config = ConfigDict(json_schema_extra=_one_of("hub", "path", "package", "config"))

    hub: Word | None = None
    """A repository on the Hugging Face hub, `owner/name`."""
    revision: Word | None = None
    path: Word | None = None
    """A Hugging Face directory or a `.gguf` file, relative to the recipe."""
    package: Word | None = None
    """An installed Python package that ships the model as `file`."""
    file: Word | None = None
    config: dict[str, Any] | Word | None = None
    """A `config.json`, or its contents, for random weights of that shape."""
    init: Literal["random"] | None = None
    tokenizer: str | None = None
    seed: int = 0
    equivalent: Equivalent | None = None
    trust_remote_code: bool = False

    @field_validator("config", mode="after")
    @classmethod
    def _numbers(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        """A `config.json` pasted into YAML says 1e-05, which YAML 1.1 takes for a word."""
        if not isinstance(value, dict):
            return value
        return {
            key: float(item) if isinstance(item, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", item) else item
            for key, item in value.items()
        }

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        _exactly_one(self, ("hub", "path", "package", "config"))
        if self.package and not self.file:
            raise ValueError("a package also needs `file`, the model inside it")
        if self.config and self.init != "random":
            raise ValueError("a config alone has no weights: add `init: random`")
        return self

    def source(self, folder: Path) -> dict[str, Any]:
        """As `worker/base.py` wants it, with paths made absolute against the recipe's folder."""
        if self.hub:
            return {"hub": self.hub, "revision": self.revision or "main"}
        if self.path:
            return {"path": str(_absolute(self.path, folder))}
        if self.package:
            return {"package": self.package, "file": self.file}
        config = self.config
        if isinstance(config, str):
            config = str(_absolute(config, folder))
        return {"config": config, "init": self.init, "seed": self.seed, "tokenizer": self.tokenizer}

    def stem(self) -> str:
        """The model's name as file names carry it: `SmolLM2-135M-Instruct`."""
        if isinstance(self.config, dict):
            name = str(self.config.get("model_type", "random"))
        else:
            name = Path(self.hub or self.file or self.path or str(self.config)).name
        if name.endswith(".gguf"):
            name = re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", name.removesuffix(".gguf"), flags=re.IGNORECASE)
        # It becomes a file's name: `path: ..` or a model type with a slash must not lead anywhere else.
        return re.sub(r"[^\w.-]+", "-", name.removesuffix(".json")).lstrip(".-") or "model"


class Source(Strict):
    """Text: exactly one of module, package, file, dataset, text."""

    model_config = ConfigDict(json_schema_extra=_one_of("module", "package", "dataset", "text", "file"))

    module: Word | None = None
    package: Word | None = None
    file: Word | None = None
    dataset: Word | None = None
    config: str | None = None
    split: str | None = None
    field: str | None = None
    text: Word | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        names = ("module", "package", "dataset", "text")
        _exactly_one(self, names if self.package else (*names, "file"))
        if self.package and not self.file:
            raise ValueError("a package also needs `file`, the text inside it")
        return self

    def resolved(self, folder: Path) -> dict[str, Any]:
        """As `worker/corpus.py` wants it, with paths made absolute against the recipe's folder."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        if "file" in given and "package" not in given:
            given["file"] = str(_absolute(given["file"], folder))
        return given


class Evaluation(Strict):
    """Tokens for perplexity: `windows` windows of `window` tokens, scored by a convention."""

    name: str | None = None
    source: Source
    window: int = Field(default=512, ge=8)
    windows: int = Field(default=20, ge=1)
    score: Literal["second-half", "all", "strided"] = "second-half"
    stride: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _strided(self) -> Self:
        if self.score == "strided" and not (self.stride and self.stride < self.window):
            raise ValueError(f"`score: strided` needs a `stride` from 1 to {self.window - 1}")
        if self.score != "strided" and self.stride is not None:
            raise ValueError("a `stride` belongs to `score: strided`")
        return self


class Calibration(Strict):
    """Tokens that methods may look at; never the evaluation's unless `allow_overlap` says so."""

    source: Source
    window: int = Field(default=512, ge=8)
    windows: int = Field(default=32, ge=1)
    seed: int = 0
    allow_overlap: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the pass's matrix products. `auto`: float32 where the recipe makes an importance matrix, whose smallest
    entries bfloat16 would move by a tenth; else bfloat16 where the processor has it, in two thirds of the time."""


class TaskModel(Strict):
    """Prompts with expected answers: a file of one's own, or a task of lm-evaluation-harness."""

    model_config = ConfigDict(json_schema_extra=_one_of("file", "lm_eval"))

    file: Word | None = None
    """YAML or JSONL, relative to the recipe; `recipes/tasks/everyday.yaml` shows every form."""
    lm_eval: Word | None = None
    """The name of a task that the harness knows."""
    include: Word | None = None
    """A folder of the harness's own YAML files, relative to the recipe."""
    shots: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    """Only the first so many items."""
    new_tokens: int | None = Field(default=None, ge=1)
    """The longest answer that is let grow, where an item says nothing else (default 32)."""
    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _exactly_one(self, ("file", "lm_eval"))
        theirs = [name for name in ("include", "shots") if getattr(self, name) is not None]
        if self.file and theirs:
            raise ValueError(f"`{theirs[0]}` belongs to `lm_eval`")
        if self.lm_eval and (self.new_tokens or self.chat):
            raise ValueError(f"`{'chat' if self.chat else 'new_tokens'}` belongs to `file`")
        return self

    def resolved(self, folder: Path) -> dict[str, Any]:
        """As `worker/tasks.py` wants it, with paths made absolute against the recipe's folder."""
        given = {name: value for name, value in self.model_dump().items() if value not in (None, False)}
        return given | {name: str(_absolute(given[name], folder)) for name in ("file", "include") if name in given}


class Limits(Strict):
    """Seconds after which a worker is stopped and its job becomes a failed row."""

    quantize_s: float = Field(default=6 * 3600, gt=0)
    profile_s: float = Field(default=3600, gt=0)


Count = Annotated[int, Field(ge=1)]
OneOrSeveral = Annotated[
    Annotated[Count, Tag("one")] | Annotated[list[Count], Field(min_length=1, max_length=16), Tag("several")],
    # Told apart before they are checked, so that a wrong number in a list is not answered with "not a number".
    Discriminator(lambda value: "several" if isinstance(value, list) else "one"),
]
"""A number, or a list of numbers."""


def _several(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


class WorkloadModel(Strict):
    """What is run for speed. Of a list the first entry is what tables show; the others are measured beside it."""

    prompt_tokens: OneOrSeveral = 512
    new_tokens: int = Field(default=64, ge=2)
    batch: OneOrSeveral = 1
    repeats: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)
    seed: int = 0
    requests: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("prompt_tokens", "batch"):
            values = _several(getattr(self, name))
            if len(set(values)) < len(values):
                raise ValueError(f"`{name}` names a value twice")
        return self

    def workload(self) -> Workload:
        """As the rest of the program has it."""
        prompts, batches = _several(self.prompt_tokens), _several(self.batch)
        return Workload(
            prompt_tokens=prompts[0], new_tokens=self.new_tokens, batch=batches[0], repeats=self.repeats,
            warmup=self.warmup, seed=self.seed, more_prompt_tokens=prompts[1:], more_batch=batches[1:],
            requests=self.requests,
        )  # fmt: skip


class Document(Strict):
    """The fixed part of a recipe; variants and backends are checked against their own modules."""

    name: Annotated[str, Field(pattern=NAME)] | None = None
    model: Annotated[str, Field(pattern=NAME)] | None = None
    base: Base
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None
    tasks: dict[Annotated[str, Field(pattern=NAME)], TaskModel] = Field(default_factory=dict)
    workload: WorkloadModel = WorkloadModel()
    limits: Limits = Limits()


@dataclass(frozen=True)
class BackendChoice:
    """A backend, its options, and which variants it runs (shell patterns)."""

    name: str
    options: dict[str, Any]
    patterns: tuple[str, ...] = ("*",)

    def takes(self, variant: str) -> bool:
        """Whether the recipe sends this variant to this backend."""
        return any(fnmatch.fnmatchcase(variant, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `path` is where it was read from; relative paths in it are relative to that."""

    name: str
    model: str
    path: Path
    base: Base
    variants: tuple[Variant, ...]
    backends: tuple[BackendChoice, ...]
    calibration: Calibration | None
    evaluation: Evaluation | None
    workload: Workload
    limits: Limits
    digest: str
    warnings: tuple[str, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    """Further sets, each with a name; `evaluation` is the first."""
    tasks: dict[str, TaskModel] = field(default_factory=dict)

    def variant(self, name: str) -> Variant:
        """The variant of that name, or a `UserError` with the nearest one."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise unknown("variant", name, [v.name for v in self.variants], str(self.path))

    def matching(self, patterns: list[str]) -> set[str]:
        """The variants that any of the names or patterns (`gguf-*`) means; a `UserError` for one that means none."""
        return _meant(patterns, self.variants, str(self.path))

    def backend(self, name: str) -> BackendChoice:
        """The backend of that name, with its defaults if the recipe does not list it."""
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
        return self.choices(name)[0]

    def choices(self, name: str) -> list[BackendChoice]:
        """The same for each value of an option that is an axis (`kv_cache: [f16, q8_0]`)."""
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
        return [choice for choice in self.backends if choice.name == name] or [BackendChoice(name, {})]


def load(path: str | Path) -> Recipe:
    """Read and check a recipe. Raises `UserError` with file, place and remedy."""
    file = Path(path)
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        text = data.decode("utf-8") if len(data) <= MAX_BYTES else ""
    except FileNotFoundError:
        folders = (file.parent, file.parent / "recipes")
        near = [str(p) for folder in folders for p in folder.glob("[!.]*.y*ml")]
        raise UserError(f"{path}: no such recipe. {did_you_mean(str(path), near)}".rstrip()) from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder, not a recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: too large for a recipe (at most {MAX_BYTES} bytes)")
    return parse(_yaml(text, str(path)), file)


def parse(data: Any, path: Path) -> Recipe:
    """A recipe from its plain data; `path` names it in messages and anchors relative paths."""
    where = str(path)
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a mapping with at least `base` and `variants`")
    data = dict(data)
    extra = {"variants", "backends"}
    for key in data:
        if key not in Document.model_fields and key not in extra:
            known = set(Document.model_fields) | extra
            raise UserError(f"{where}: unknown key '{key}'. {did_you_mean(key, known)}")
    data["evaluation"], further = _evaluations(data.get("evaluation"), where)
    raw_variants, raw_backends = data.pop("variants", None), data.pop("backends", None)
    document = _validate(TypeAdapter(Document), data, where, "")
    variants = _variants(raw_variants, where)
    backends = _backends(raw_backends, where, variants)
    warnings = []
    if document.calibration is None:
        # The base stands before what the recipe lists.
        for i, variant in enumerate(variants):
            module, options = _method(variant)
            if module.needs_calibration(options):
                raise UserError(
                    f"{where}: variants[{i - 1}] ({variant.name}) looks at calibration tokens: add a `calibration`"
                )
    for variant in variants:
        if variant.method == "base":
            continue
        module, options = _method(variant)
        for backend, reason in module.limits(options).items():
            if any(choice.name == backend and choice.takes(variant.name) for choice in backends):
                warnings.append(f"{variant.name} will not run on {backend}: {reason}")
    return Recipe(
        name=document.name or path.stem,
        model=document.model or document.base.stem(),
        path=path,
        base=document.base,
        variants=variants,
        backends=backends,
        calibration=document.calibration,
        evaluation=document.evaluation,
        evaluations=further,
        tasks=document.tasks,
        workload=document.workload.workload(),
        limits=document.limits,
        digest=digest(
            [
                document.model_dump(mode="json"),
                to_json(variants),
                to_json(backends),
                *(each.model_dump(mode="json") for each in further),
            ]
        ),  # fmt: skip
        warnings=tuple(warnings),
    )


def _evaluations(raw: Any, where: str) -> tuple[Any, tuple[Evaluation, ...]]:
    """The first evaluation set as it stands in the recipe, still to be checked, and the further ones of a mapping
    from names to sets."""
    keys = set(Evaluation.model_fields)
    several = (
        isinstance(raw, dict)
        and raw
        and not keys & set(raw)
        and all(isinstance(value, dict) for value in raw.values())
        and any(keys & set(value) for value in raw.values())
    )
    if not several:
        return raw, ()
    checked = []
    for name, value in raw.items():
        place = f"evaluation.{name}"
        if not re.fullmatch(NAME, str(name)):
            raise UserError(f"{where}: {place}: a name has letters, digits, '.', '_' and '-' only, not {name!r}")
        if "name" in value:
            raise UserError(f"{where}: {place}: '{name}' is its name; leave the `name` inside out")
        checked.append(_validate(TypeAdapter(Evaluation), {**value, "name": str(name)}, where, place))
    first = next(iter(raw.items()))
    return {**first[1], "name": str(first[0])}, tuple(checked[1:])


def limits_of(variant: Variant) -> dict[str, str]:
    """Backend name -> why it cannot load what this variant's options make."""
    if variant.method == "base":
        return {}
    module, options = _method(variant)
    return dict(module.limits(options))


def format_of(variant: Variant) -> str:
    """The artifact format a variant will have."""
    return "safetensors" if variant.method == "base" else str(_module(METHODS[variant.method]).FORMAT)


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors; generated from the same types that validate."""
    top = TypeAdapter(Document).json_schema(ref_template="#/$defs/{model}")
    definitions = top.setdefault("$defs", {})

    def options_of(kind: type, name: str) -> dict[str, Any]:
        own = TypeAdapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions.update(own.pop("$defs", {}))
        own["title"] = name
        return own

    forms: list[dict[str, Any]] = []
    for word, module in METHODS.items():
        options = options_of(_module(module).Options, f"{word} options")
        forms_of_value: list[dict[str, Any]] = [options]
        if word == "gguf":
            forms_of_value.append(options["properties"]["type"])
        if not options.get("required"):
            forms_of_value.append({"type": "null"})
            forms.append({"const": word})
        forms.append(
            {
                "type": "object",
                "properties": {word: {"anyOf": forms_of_value}, "name": {"type": "string"}},
                "required": [word],
                "additionalProperties": False,
            }
        )
    backends = {}
    for word, module in BACKENDS.items():
        options = options_of(_module(module).Options, f"{word} options")
        options["properties"]["variants"] = {"type": "array", "items": {"type": "string"}}
        if "kv_cache" in options["properties"]:
            single = options["properties"]["kv_cache"]
            several = {"type": "array", "items": single, "minItems": 1, "uniqueItems": True}
            options["properties"]["kv_cache"] = {"anyOf": [single, several]}
        backends[word] = {"anyOf": [options, {"type": "null"}]}
    one_set = {"$ref": "#/$defs/Evaluation"}
    several = {"type": "object", "additionalProperties": one_set, "minProperties": 1}
    several |= {"propertyNames": {"pattern": NAME, "not": {"enum": list(Evaluation.model_fields)}}}
    top["properties"]["evaluation"] = {"anyOf": [one_set, several, {"type": "null"}], "default": None}
    top["properties"]["variants"] = {"type": "array", "items": {"anyOf": forms}, "minItems": 1}
    top["properties"]["backends"] = {
        "anyOf": [
            {"type": "object", "properties": backends, "additionalProperties": False},
            {"type": "array", "items": {"enum": list(BACKENDS)}, "minItems": 1},
        ]
    }
    top["required"] = ["base", "variants"]
    top["title"] = "Workbench recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top}


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _method(variant: Variant) -> tuple[Any, Any]:
    if variant.method == "base":
        return _BaseMethod, None
    module = _module(METHODS[variant.method])
    return module, module.Options(**variant.options)


class _BaseMethod:
    """The base needs nothing and every engine loads it."""

    @staticmethod
    def needs_calibration(options: Any) -> bool:
        return False


def _variants(raw: Any, where: str) -> tuple[Variant, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: variants: a list with at least one entry, such as `- gguf: Q4_K_M`")
    found = [Variant("base", "base")]
    for i, entry in enumerate(raw):
        place = f"variants[{i}]"
        if isinstance(entry, str):
            entry = {entry: {}}
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {place}: write `- METHOD: {{options}}`, with METHOD one of {', '.join(METHODS)}")
        words = [key for key in entry if key != "name"]
        for word in words:
            if word not in METHODS:
                raise unknown("method", str(word), METHODS, f"{where}: {place}")
        if len(words) != 1:
            raise UserError(f"{where}: {place}: one method an entry, found {', '.join(words) or 'none'}")
        word = words[0]
        module = _module(METHODS[word])
        value = entry[word]
        if value is None:
            value = {}
        if word == "gguf" and not isinstance(value, dict):
            value = {"type": value}
        options = _validate(TypeAdapter(module.Options), value, where, f"{place}.{word}")
        if hasattr(module, "check"):
            try:
                module.check(options)
            except UserError as error:
                raise UserError(f"{where}: {place}: {error}") from None
        name = entry.get("name") or module.default_name(options)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
            raise UserError(f"{where}: {place}.name: letters, digits, '.', '_' and '-' only, not {name!r}")
        if name in {variant.name for variant in found}:
            raise UserError(f"{where}: {place}: a variant named '{name}' is already there; give one a `name`")
        found.append(Variant(name, word, to_json(options)))
    return tuple(found)


def _backends(raw: Any, where: str, variants: tuple[Variant, ...]) -> tuple[BackendChoice, ...]:
    if raw is None:
        raw = list(BACKENDS)
    if isinstance(raw, list) and all(isinstance(name, str) for name in raw):
        raw = dict.fromkeys(raw)
    if not isinstance(raw, dict) or not raw:
        raise UserError(f"{where}: backends: a list of names or a mapping from name to options")
    found = []
    for name, options in raw.items():
        if name not in BACKENDS:
            raise unknown("backend", str(name), BACKENDS, f"{where}: backends")
        place = f"backends.{name}"
        if options is not None and not isinstance(options, dict):
            raise UserError(f"{where}: {place}: a mapping of options, or nothing")
        options = dict(options or {})
        patterns = options.pop("variants", ["*"])
        if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
            raise UserError(f"{where}: {place}.variants: a list of variant names or patterns")
        _meant(patterns, variants, f"{where}: {place}.variants")
        kind = _module(BACKENDS[name]).Options
        axis = options.get("kv_cache")
        values = axis if isinstance(axis, list) and axis else [axis]
        if len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{where}: {place}.kv_cache: names a value twice")
        for value in values:
            one = options if value is None else {**options, "kv_cache": value}
            checked = _validate(TypeAdapter(kind), one, where, place, also={"variants"})
            found.append(BackendChoice(name, to_json(checked), tuple(patterns)))
    return tuple(found)


def _meant(patterns: list[str], variants: tuple[Variant, ...], where: str) -> set[str]:
    """Names of the variants that any of the patterns means; a `UserError` at `where` for one that means none."""
    names, meant = [variant.name for variant in variants], set[str]()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise unknown("variant", pattern, names, where)
        meant.update(found)
    return meant


def _validate(adapter: TypeAdapter[Any], value: Any, where: str, place: str, also: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    try:
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        # A mistyped key is also a missing one; what was mistyped is what the person can see.
        first = min(error.errors(), key=lambda one: one["type"] not in UNKNOWN_KEY)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {place or 'recipe'}: {error}") from None
    place = _place(place, first["loc"])
    kind, context = first["type"], first.get("ctx", {})
    if kind in UNKNOWN_KEY:
        holder, _, key = place.rpartition(".")
        known = _keys(adapter, first["loc"]) | also
        message = f"unknown key '{key}'. {did_you_mean(key, known)}"
        place = holder
    elif kind == "literal_error":
        values = re.findall(r"[^\s',]+(?=[',]|$| or )", context["expected"])
        message = f"unknown value '{first['input']}'. {did_you_mean(str(first['input']), values)}"
    elif kind in ("missing", "missing_argument"):
        message = "missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        if not isinstance(first["input"], dict | list):
            message += f" (found {first['input']!r})"
    raise UserError(f"{where}: {place + ': ' if place else ''}{message}")


def _place(prefix: str, location: tuple[int | str, ...]) -> str:
    place = prefix
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in ("str", "dict[str,any]", "one", "several"):
            place += f".{part}" if place else str(part)
    return place


def _keys(adapter: TypeAdapter[Any], location: tuple[int | str, ...]) -> set[str]:
    """The keys known where an unknown one was found, from the schema that editors use."""
    whole = adapter.json_schema()
    node = whole
    for part in location[:-1]:
        held = [node.get("additionalProperties"), *node.get("patternProperties", {}).values()]
        any_name = next((kind for kind in held if isinstance(kind, dict)), {})
        node = node.get("properties", {}).get(part, any_name)
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = whole["$defs"][option["$ref"].rsplit("/", 1)[1]]
    return set(node.get("properties", {}))


def _absolute(path: str, folder: Path) -> Path:
    return Path(folder, Path(path).expanduser()).absolute()


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    # Before a merge (`<<`) is spelt out, because what is merged may be given again.
    own: set[str] = set()
    for key_node, _ in node.value:
        word = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if word is None or word in own:
            problem = "a key must be a word" if word is None else f"'{word}' is given twice"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        own.add(word)
    loader.flatten_mapping(node)
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _yaml(text: str, where: str) -> Any:
    try:
        aliases = depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if aliases > MAX_ALIASES:
                raise UserError(f"{where}: a recipe may have {MAX_ALIASES} YAML aliases at most")
            if depth > MAX_DEPTH:
                raise UserError(f"{where}: a recipe may be {MAX_DEPTH} levels deep at most")
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a subclass of the safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None
