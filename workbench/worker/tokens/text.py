"""Text from where a recipe says it is: a module, a package's file, a file, a dataset.

A file is UTF-8 (a byte order mark is skipped), and its lines end in `\\n`: `\\r\\n` becomes that, so that one text has
the same tokens wherever it was saved. What a JSON string says stays as it is.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from workbench.disk import expanded
from workbench.errors import LONGEST_PATH, UserError, did_you_mean, importing, short, unknown
from workbench.worker.base.sources import distribution_of

SOURCES = ("module", "package", "file", "dataset", "text")
SEPARATOR = "\n\n"
"""Between documents; WikiText's perplexity is by custom measured on its lines joined so."""
STREAMED = ("c4", "mc4", "fineweb", "slimpajama")
"""Datasets that nobody wants whole: of these only what is needed is fetched."""


@dataclass(frozen=True)
class Source:
    """Where text is: one of `SOURCES`, and what belongs to it (a package's `file`, a dataset's `config`, ...)."""

    module: str | None = None
    package: str | None = None
    file: str | None = None
    dataset: str | None = None
    text: str | None = None
    config: str | None = None
    split: str | None = None
    field: str | None = None

    @property
    def kind(self) -> str:
        """Which of `SOURCES` it is."""
        return next(kind for kind in SOURCES if getattr(self, kind) is not None)

    def __str__(self) -> str:
        if self.kind == "text":
            return "the recipe's own text"
        parts = [short(part) for part in (self.config, self.split, self.file if self.package else None) if part]
        return " ".join([f"{self.kind} '{short(getattr(self, self.kind), LONGEST_PATH)}'", *parts])


def source_of(given: Mapping[str, str | None]) -> Source:
    """A source as a recipe gives it. Raises `UserError` for none and for a word that is none."""
    for key in given:
        if key not in {field.name for field in fields(Source)}:
            raise unknown("text source", key, SOURCES)
    if all(given.get(kind) is None for kind in SOURCES):
        raise UserError(f"a text source is empty. Give one of: {', '.join(SOURCES)}.")
    return Source(**given)


def read_text(source: Source, need_tokens: int | None = None) -> str:
    """A source's text; of a streamed dataset about as much as `need_tokens` tokens take. Never empty."""
    if source.text is not None:
        text = source.text
    elif source.module is not None:
        text = _module_text(source.module)
    elif source.dataset is not None:
        text = _dataset_text(source, source.dataset, need_tokens)
    else:
        path = _package_path(source.package, source.file) if source.package else expanded(source.file or "")
        text = _records_text(path, source.field or "text") if is_records(path) else read_file(path)
    if not text.strip():
        raise UserError(f"{source} is empty: there is nothing to score. Name a source with text.")
    check_characters(text, str(source))
    return text


def _module_text(name: str) -> str:
    """The text that a Python module carries: a string, or a mapping's strings in the order of their keys.

    Under the module's own name, or under the only name that holds any.
    """
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UserError(f"module '{short(name)}' cannot be imported here: install the package it is part of.") from None
    except (Exception, SystemExit) as error:  # a relative name, or whatever its code does
        raise UserError(f"module '{short(name)}' cannot be imported here ({one_line(error)}): name another.") from None
    held = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, str | dict) and v}
    own = name.rpartition(".")[2]
    if own not in held and len(held) != 1:
        found = f"several ({', '.join(sorted(held))})" if held else "neither strings nor mappings"
        raise UserError(f"module '{name}' must hold one text, or one of its own name; it holds {found}.")
    wanted = own if own in held else next(iter(held))
    value = held[wanted]
    if isinstance(value, str):
        return value
    if not all(isinstance(item, str) for item in value.values()):
        raise UserError(f"module '{name}': {wanted} holds more than strings. Name another module.")
    return SEPARATOR.join(value[key] for key in sorted(value))


def _package_path(package: str, file: str | None) -> Path:
    distribution = distribution_of(package, "the text")
    if not file:
        raise UserError(f"package '{package}': say which `file` of it holds the text.")
    path = Path(str(distribution.locate_file(file)))
    if not os.path.isfile(path):
        names = [str(f) for f in distribution.files or [] if not str(f).endswith(".pyc")]
        hint = did_you_mean(file, names)
        raise UserError(
            f"package '{package}' {distribution.version} has no file '{short(file)}'. "
            f"{hint if hint.startswith('Did') else f'It has {len(names)} files.'}"
        )
    return path


def read_file(path: Path, what: str = "text file") -> str:
    """The text of a UTF-8 file, its lines ended by `\\n`. Raises `UserError` for a file that holds none."""
    try:
        kind = path.stat().st_mode
        # A pipe is not opened: that may wait for ever.
        data = path.read_bytes() if stat.S_ISREG(kind) else b""
    except (FileNotFoundError, NotADirectoryError):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside)
        hint = hint if hint.startswith("Did") else "Check the path."
        raise UserError(f"{what} {short(path, LONGEST_PATH)} does not exist. {hint}") from None
    except OSError as error:
        raise UserError(f"{what} {short(path, LONGEST_PATH)} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(kind):
        raise UserError(f"{what} {path} is a {'directory' if stat.S_ISDIR(kind) else 'pipe or a device'}: name a file")
    if b"\0" in data:
        raise UserError(f"{path} is a binary file (a zero byte at {data.index(0)}). Name UTF-8 text or JSONL.")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}) in line {line}. Convert it, or name another file."
        ) from None


def is_jsonl(path: Path) -> bool:
    """Whether a file's name says that each of its lines is JSON."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def is_records(path: Path) -> bool:
    """Whether a file's name says that it holds records: one a line, or an array of them."""
    return is_jsonl(path) or path.suffix.lower() == ".json"


def records(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """(where it stands, for messages; what it holds) of each entry of a `.json` array, or line of a JSONL file that is
    not empty."""
    if is_jsonl(path):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}: line {number}"
                yield where, _value(line, where, "Each line must be one record")
        return
    found = _value(text, str(path), "For one record a line, name it .jsonl")
    if not isinstance(found, list):
        raise UserError(f"{path}: not an array of records ([...]). For one record a line, name it .jsonl")
    for number, entry in enumerate(found, 1):
        yield f"{path}: record {number}", entry


def _value(text: str, where: str, hint: str) -> object:
    """What a JSON text says. Raises `UserError` if it is none, or says half a character."""
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        fault = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) and error.lineno > 1 else ""
        raise UserError(f"{where} is not valid JSON{fault}. {hint}.") from None
    if "\\u" in text:
        check_characters(json.dumps(found, ensure_ascii=False), where)
    return found


def check_characters(text: str, where: str) -> None:
    """Raise `UserError` for half a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds \\u{ord(text[error.start]):04x}, half of a character. Write the whole one, or none."
        ) from None


def _records_text(path: Path, field: str) -> str:
    documents = []
    for where, entry in records(path, read_file(path)):
        if isinstance(entry, str):
            documents.append(entry)
            continue
        record = entry if isinstance(entry, dict) else {}
        if not isinstance(record.get(field), str):
            state = "is not text" if field in record else "is missing"
            raise UserError(f"{where}: field '{short(field)}' {state}. {did_you_mean(field, record)}".rstrip())
        documents.append(record[field])
    return SEPARATOR.join(documents)


def _dataset_text(source: Source, name: str, need_tokens: int | None) -> str:
    """Documents of a dataset, joined."""
    with importing("the library `datasets`", "pip install datasets"):
        import datasets
    field, streaming = source.field or "text", name.lower().rpartition("/")[2] in STREAMED
    by_hand = "or give the text as `file:` (.txt or .jsonl)"
    limit = max(0, need_tokens or 0) * 8  # characters: no tokenizer of this field spends fewer tokens on text
    documents: list[str] = []
    held = 0
    try:
        rows = datasets.load_dataset(name, source.config, split=source.split or "train", streaming=streaming)
        for number, row in enumerate(rows):
            if not isinstance(row.get(field), str):
                raise UserError(f"{source}: row {number} has no text field '{field}'. {did_you_mean(field, row)}")
            documents.append(row[field])
            held += len(row[field])
            if streaming and need_tokens is not None and held > limit:
                break
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{source} does not exist, is gated, or the hub cannot be reached: check the name and HF_TOKEN, {by_hand}."
        ) from None
    except UserError:
        raise
    except ValueError as error:  # unknown configurations and splits come as plain ValueErrors
        raise UserError(f"{source}: {one_line(error)} Check `config` and `split`.") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{source} cannot be fetched ({one_line(error)}): check the connection, {by_hand}.") from None
    return SEPARATOR.join(documents)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
