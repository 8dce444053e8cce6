"""Where a base and a text come from, as pydantic models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from workbench.disk import expanded
from workbench.errors import short
from workbench.recipe.words import (
    HUB,
    MODULE,
    PACKAGE,
    File,
    Seed,
    Text,
    Word,
    known_home,
    of_64_bits,
    plain_name,
)


class Strict(BaseModel):
    """Unknown keys are errors, and numbers finite; objects do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def exactly_one(record: BaseModel, names: tuple[str, ...]) -> None:
    """Raises `ValueError` unless one of the keys, and no other of them, is given."""
    given = [name for name in names if getattr(record, name) is not None]
    if len(given) != 1:
        found = f"found {' and '.join(given)}" if given else "found none"
        raise ValueError(f"give exactly one of {', '.join(names)} ({found})")


def one_of(*names: str) -> JsonDict:
    """The same as JSON schema, for editors; a package's `file` is not a source of its own."""
    forms: list[JsonValue] = [{"required": [name]} for name in names if name != "file"]
    alone: JsonDict = {"required": ["file"], "not": {"required": ["package"]}}
    return {"oneOf": [*forms, alone] if "file" in names else forms}


def _in_package(package: str | None, file: str | None, what: str) -> None:
    if package and not file:
        raise ValueError(f"a package also needs `file`, {what} inside it")
    if package and file and (not Path(file).parts or {"..", "/"} & {*Path(file).parts}):
        raise ValueError(f"`file` is a path inside the package, not '{short(file)}'")


class Equivalent(Strict):
    """An exact, function-preserving rewrite of a Llama: rescaled off its grid, zero-padded to `hidden`."""

    hidden: int = Field(gt=0, le=2**17)
    """The hidden size after padding; a multiple of 256 lets every K-quant hold every tensor."""
    seed: Seed = 0
    """The seed of the random factors by which channels are rescaled."""


class Base(Strict):
    """Where the unquantized model comes from: exactly one of hub, path, package, config."""

    model_config = ConfigDict(json_schema_extra=one_of("hub", "path", "package", "config"))

    hub: Annotated[Word, Field(pattern=HUB)] | None = None
    """A repository on the Hugging Face hub, `owner/name`."""
    revision: Word | None = None
    """A branch, tag or commit of the hub's repository (default `main`)."""
    path: File | None = None
    """A Hugging Face directory or a `.gguf` file, relative to the recipe."""
    package: Annotated[Word, Field(pattern=PACKAGE)] | None = None
    """An installed Python package that ships the model as `file`."""
    file: Word | None = None
    """The model's path inside `package`."""
    config: dict[str, Any] | Word | None = None
    """A `config.json`, or its contents, for random weights of that shape."""
    init: Literal["random"] | None = None
    """`random`, beside `config`: weights of that shape made up, for speed and memory only."""
    tokenizer: File | None = None
    """Beside `config`: whose tokenizer is taken, a directory, a `.gguf` file or a hub repository. Without one,
    no tasks and no perplexity."""
    seed: Seed = 0
    """The seed of random weights."""
    # Left out where there is none, so that recipes from before it keep their digest.
    adapter: Annotated[File | None, Field(exclude_if=lambda value: value is None)] = None
    """A LoRA adapter that is merged into the base before anything else: a folder, relative to the recipe, or a hub
    repository."""
    equivalent: Equivalent | None = None
    """Rewrite the base into another with the same function before anything is made of it."""
    trust_remote_code: bool = False
    """Let Python code that comes with the model run."""

    @field_validator("config", mode="after")
    @classmethod
    def _numbers(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        """A `config.json` pasted into YAML says 1e-05, which YAML 1.1 takes for a word."""
        if not isinstance(value, dict):
            return known_home(value) if value else value
        read = {
            key: float(item) if isinstance(item, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", item) else item
            for key, item in value.items()
        }
        if not of_64_bits(read):
            raise ValueError("numbers must be finite, and of 64 bits at most")
        return read

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        exactly_one(self, ("hub", "path", "package", "config"))
        _in_package(self.package, self.file, "the model")
        if self.config and self.init != "random":
            raise ValueError("a config alone has no weights: add `init: random`")
        if self.config and self.adapter:
            raise ValueError("an adapter changes a model's weights, and a config alone has none")
        return self

    def source(self, folder: Path) -> dict[str, Any]:
        """As `worker/base/prepare.py` wants it, with paths made absolute against the recipe's folder."""
        return self._source(folder) | ({"adapter": self._adapter(folder)} if self.adapter else {})

    def _adapter(self, folder: Path) -> str:
        """Its folder, or the name of a repository."""
        here = absolute(str(self.adapter), folder)
        return str(self.adapter) if re.fullmatch(HUB, str(self.adapter)) and not here.exists() else str(here)

    def _source(self, folder: Path) -> dict[str, Any]:
        if self.hub:
            return {"hub": self.hub, "revision": self.revision or "main"}
        if self.path:
            return {"path": str(absolute(self.path, folder))}
        if self.package:
            return {"package": self.package, "file": self.file}
        config = self.config
        if isinstance(config, str):
            config = str(absolute(config, folder))
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
        return plain_name(name.removesuffix(".json"))


class Source(Strict):
    """Text: exactly one of module, package, file, dataset, text."""

    model_config = ConfigDict(json_schema_extra=one_of("module", "package", "dataset", "text", "file"))

    module: Annotated[Word, Field(pattern=MODULE)] | None = None
    """A Python module that holds one text, or a mapping of texts, such as `pydoc_data.topics`."""
    package: Annotated[Word, Field(pattern=PACKAGE)] | None = None
    """An installed Python package that ships the text as `file`."""
    file: File | None = None
    """A UTF-8 file, relative to the recipe: plain text, or records (`.json`, `.jsonl`). With `package`: inside it."""
    dataset: Word | None = None
    """A dataset on the Hugging Face hub, read by the library `datasets`."""
    config: Word | None = None
    """The configuration of `dataset`, where it has several."""
    split: Word | None = None
    """The split of `dataset` (default `train`)."""
    field: Word | None = None
    """Which key of a record holds the text (default `text`)."""
    text: Text | None = None
    """The text itself, in the recipe."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        names = ("module", "package", "dataset", "text")
        exactly_one(self, names if self.package else (*names, "file"))
        _in_package(self.package, self.file, "the text")
        return self

    def resolved(self, folder: Path) -> dict[str, str]:
        """As `worker/tokens/windows.py` wants it, with paths made absolute against the recipe's folder."""
        given = {name: value for name, value in self.model_dump().items() if value is not None}
        if "file" in given and "package" not in given:
            given["file"] = str(absolute(given["file"], folder))
        return given


def absolute(path: str, folder: Path) -> Path:
    """A recipe's path, from the folder that the recipe is in."""
    return Path(folder, expanded(path)).absolute()
