"""Where a base may come from, and how two states of one source are told apart.

Files in place are known by name, size and time of change, which is cheap (`stamps`); once they are read anyway,
by what they hold (`content_digest`). A model inside an installed Python package is a file like any other, with
the package's version and license.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from workbench.disk import expanded, readable
from workbench.errors import LONGEST_PATH, UserError, did_you_mean, install_with, unknown
from workbench.errors import short as shortened
from workbench.worker import Progress

SOURCES = ("hub", "path", "gguf", "package", "config")


@dataclass(frozen=True)
class BaseSource:
    """Where a base is: one of `SOURCES`, and what belongs to it."""

    hub: str = ""
    path: str = ""
    gguf: str = ""
    package: str = ""
    config: Mapping[str, Any] | str = ""
    """A `config.json`, or its content, for random weights (`init`) of that shape from a `seed`."""
    revision: str = "main"
    file: str | None = None
    """The model inside the package."""
    init: str = "random"
    seed: int = 0
    tokenizer: Mapping[str, Any] | str | None = None
    """Another model's, as a source of its own or by its name."""
    adapter: str = ""
    """A folder or a hub repository, merged into it."""

    def located(self) -> tuple[Path, str | None]:
        """The file or directory of a source on this machine, and the license it came with."""
        return package_file(self.package, self.file) if self.package else (local_path(self.path or self.gguf), None)


def source_of(given: object) -> BaseSource:
    """A source as a recipe gives it; `UserError` if it is none."""
    found = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
    for key in found:
        if key not in {field.name for field in fields(BaseSource)}:
            raise unknown("base source", key, SOURCES)
    if not any(found.get(kind) for kind in SOURCES):
        raise UserError(f"the base has no source. Give one of: {', '.join(SOURCES)}.")
    return BaseSource(**found)


def named_source(value: Mapping[str, Any] | str) -> BaseSource:
    """A tokenizer or adapter: a source of its own, a local path, or a hub repository's name."""
    if not isinstance(value, str):
        return source_of(value)
    is_path = os.path.exists(expanded(value)) or value.startswith((".", "/", "~")) or value.count("/") != 1
    return BaseSource(path=value) if is_path else BaseSource(hub=value)


def local_path(value: str | os.PathLike[str]) -> Path:
    """The absolute path of a file or directory; `UserError` with the nearest name if there is none."""
    path = expanded(value)
    with readable(path):
        if path.is_file() or path.is_dir():
            return path.resolve()
        if path.exists():
            raise UserError(f"base path {shortened(path, LONGEST_PATH)} is neither a file nor a folder.")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside) if beside else f"There is no directory {path.parent} either."
    if hint.startswith("Known"):
        hint = f"Nothing in {path.parent} has a name like it."
    raise UserError(f"base path {path} does not exist. {hint}")


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change of a file, or of each file in a directory, without reading any."""
    with readable(path):
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
        return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def content_digest(files: list[Path], progress: Progress) -> str:
    """SHA-256 over the names, sizes and content of files."""
    total = sum(p.stat().st_size for p in files) or 1
    whole, done = hashlib.sha256(), 0
    for path in files:
        one = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(1 << 24):
                one.update(block)
                done += len(block)
                progress(done, total, f"reading {path.name}")
        whole.update(f"{path.name}\0{path.stat().st_size}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest()


def distribution_of(name: str, holds: str = "the base") -> importlib.metadata.Distribution:
    """An installed package; `UserError` if it is not. `holds`: what it is wanted for."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise install_with(f"the package '{name}' that holds {holds}", f"pip install {name}") from None


def package_file(package: str, file: str | None) -> tuple[Path, str | None]:
    """A file that an installed package brought along, and the package's license."""
    distribution = distribution_of(package)
    names = [
        str(f) for f in distribution.files or [] if str(f).lower().endswith((".gguf", ".safetensors", "config.json"))
    ]
    if not file:
        ggufs = [n for n in names if n.lower().endswith(".gguf")]
        if len(ggufs) != 1:
            raise UserError(
                f"package '{package}' holds {len(ggufs)} GGUF files; name one with `file:`. {did_you_mean('', ggufs)}"
            )
        file = ggufs[0]
    path = Path(str(distribution.locate_file(file)))
    if not os.path.exists(path):
        raise unknown("file", file, names, f"package '{package}' {distribution.version}")
    facts = distribution.metadata
    license_name = next((facts[key] for key in ("License-Expression", "License") if key in facts and facts[key]), None)
    # Some packages paste the whole text into the field; a license's name is one short line.
    short = license_name if license_name and "\n" not in license_name and len(license_name) < 64 else None
    return path.resolve(), short
