"""Text from where a recipe says it is: a module, a package's file, a file, a dataset."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

from workbench.errors import UserError, did_you_mean, install_with, unknown

SOURCES = ("module", "package", "file", "dataset", "text")
SEPARATOR = "\n\n"
"""Between documents; WikiText's perplexity is by custom measured on its lines joined so."""


def describe(source: dict[str, Any]) -> str:
    kind = _kind(source)
    if kind == "text":
        return "the recipe's own text"
    parts = [str(source[k]) for k in ("config", "split") if source.get(k)]
    return " ".join([f"{kind} '{source[kind]}'", *parts, *([str(source["file"])] if kind == "package" else [])])


def _kind(source: dict[str, Any]) -> str:
    for kind in SOURCES:
        if kind in source and source[kind] is not None:
            return kind
    for key in source:
        raise unknown("text source", key, SOURCES)
    raise UserError(f"a text source is empty. Give one of: {', '.join(SOURCES)}.")


# --- text ---------------------------------------------------------------------------------------


def read_text(source: dict[str, Any], need_tokens: int | None = None) -> str:
    """A source's text; of a streamed dataset about as much as `need_tokens` tokens take. Never empty."""
    kind = _kind(source)
    if kind == "text":
        text = str(source["text"])
    elif kind == "module":
        text = _module_text(source["module"], source.get("attribute"))
    elif kind == "dataset":
        text = _dataset_text(source, need_tokens)
    else:
        path = _package_path(source["package"], source.get("file")) if kind == "package" else _file_path(source["file"])
        text = _jsonl_text(path, source.get("field") or "text") if _is_jsonl(path) else _plain_text(path)
    if not text.strip():
        raise UserError(f"{describe(source)} is empty: there is nothing to score. Name a source with text.")
    return text


def _module_text(name: str, attribute: str | None) -> str:
    """The text that a Python module carries: a string, or a mapping's strings in the order of their keys."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise UserError(f"module '{name}' cannot be imported here: install the package it is part of.") from None
    held = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, str | dict) and v}
    wanted = attribute or (name.rpartition(".")[2] if name.rpartition(".")[2] in held else None)
    if wanted is None and len(held) == 1:
        wanted = next(iter(held))
    if wanted is None or wanted not in held:
        hint = did_you_mean(attribute or "", held) if held else "It holds neither strings nor mappings."
        raise UserError(f"module '{name}': which `attribute` holds the text? {hint}")
    value = held[wanted]
    if isinstance(value, str):
        return value
    if not all(isinstance(item, str) for item in value.values()):
        raise UserError(f"module '{name}': {wanted} holds more than strings. Name another `attribute`.")
    return SEPARATOR.join(value[key] for key in sorted(value))


def _file_path(value: str) -> Path:
    path = Path(value).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"text file {path} is a directory. Name a .txt or .jsonl file in it.")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside)
    raise UserError(f"text file {path} does not exist. {hint if hint.startswith('Did') else 'Check the path.'}")


def _package_path(package: str, file: str | None) -> Path:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise install_with(f"the package '{package}' that holds the text", f"pip install {package}") from None
    if not file:
        raise UserError(f"package '{package}': say which `file` of it holds the text.")
    path = Path(str(distribution.locate_file(file)))
    if not path.is_file():
        names = [str(f) for f in distribution.files or [] if not str(f).endswith(".pyc")]
        hint = did_you_mean(file, names)
        raise UserError(
            f"package '{package}' {distribution.version} has no file '{file}'. "
            f"{hint if hint.startswith('Did') else f'It has {len(names)} files.'}"
        )
    return path


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson")


def _plain_text(path: Path) -> str:
    data = path.read_bytes()
    if b"\0" in data:
        raise UserError(f"{path} is a binary file (a zero byte at {data.index(0)}). Name UTF-8 text or JSONL.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}). Convert it, or name another file.") from None


def _jsonl_text(path: Path, field: str) -> str:
    documents = []
    for number, line in enumerate(_plain_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is not valid JSON. Each line must be one object.") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = list(record) if isinstance(record, dict) else []
            state = "is not text" if field in keys else "is missing"
            raise UserError(f"{path}: line {number}: field '{field}' {state}. {did_you_mean(field, keys)}".rstrip())
        documents.append(record[field])
    return SEPARATOR.join(documents)


def _dataset_text(source: dict[str, Any], need_tokens: int | None) -> str:
    """Documents of a dataset, joined. C4 and its like are streamed: only what is needed is fetched."""
    try:
        import datasets
    except ImportError:
        raise install_with("the library `datasets`", "pip install datasets") from None
    name, config, split = source["dataset"], source.get("config"), source.get("split") or "train"
    field = source.get("field") or "text"
    streaming = bool(source.get("streaming", name.lower().rpartition("/")[2] in ("c4", "mc4", "fineweb", "slimpajama")))
    where = describe(source)
    by_hand = "or give the text as `file:` (.txt or .jsonl)"
    limit = max(0, need_tokens or 0) * 8  # characters: no tokenizer of this field spends fewer tokens on text
    documents: list[str] = []
    held = 0
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
        for number, row in enumerate(rows):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: row {number} has no text field '{field}'. {did_you_mean(field, row)}")
            documents.append(row[field])
            held += len(row[field])
            if streaming and need_tokens is not None and held > limit:
                break
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
        raise UserError(
            f"{where} does not exist, is gated, or the hub cannot be reached: check the name and HF_TOKEN, {by_hand}."
        ) from None
    except UserError:
        raise
    except ValueError as error:  # unknown configurations and splits come as plain ValueErrors
        raise UserError(f"{where}: {one_line(error)} Check `config` and `split`.") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} cannot be fetched ({one_line(error)}): check the connection, {by_hand}.") from None
    return SEPARATOR.join(documents)


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:200]
