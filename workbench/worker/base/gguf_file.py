"""A GGUF file, opened: whole, laid out as llama.cpp lays it out, and each of its fields and tensors there to be read.

The `gguf` package's reader trusts what it reads: a count with one bit turned makes it loop for hours, and tensors
may lie on top of each other. So the header's skeleton is walked first, within the file's bounds.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by GGUF's number of its type; 8 is a string, 9 an array."""

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How llama.cpp names the parts of a file that is split, and finds them."""
DIMENSIONS = 4
"""Most dimensions of a tensor (`GGML_MAX_DIMS`)."""


def open_gguf(path: Path) -> Any:
    """A GGUF file's reader, all tensors inside the file, one after the other. `UserError` for any that is not whole, or
    is one part of several."""
    reader = _opened(path)
    parts = field_of(reader, "split.count", 1)
    if parts > 1:
        raise UserError(f"{path} is one part of {parts}: join them with llama.cpp's `llama-gguf-split --merge` first.")
    _check_model(path, [reader])
    return reader


def open_parts(path: Path) -> list[Any]:
    """The reader of a GGUF file, or those of all parts of one that is split and named by its first. `UserError` for any
    part that is not whole, or not of this file."""
    paths = present_parts(path)
    readers = [_opened(part) for part in paths]
    for place, (part, reader) in enumerate(zip(paths, readers, strict=True)):
        count, number = field_of(reader, "split.count", 1), field_of(reader, "split.no", 0)
        if (count, number) != (len(paths), place):
            raise UserError(
                f"{part} is part {number + 1} of {count} by its header, not by its name: give it the one that it had, "
                "such as X-00001-of-00003.gguf"
            )
    total, found = field_of(readers[0], "split.tensors.count"), sum(len(reader.tensors) for reader in readers)
    if total is not None and total != found:
        raise UserError(f"{path}: its parts hold {found} tensors, its header counts {total}. Fetch them again.")
    _check_model(path, readers)
    return readers


def present_parts(path: Path) -> list[Path]:
    """The files of a GGUF model by the path of its first. `UserError` for one that is not there."""
    parts = parts_of(path)
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        raise UserError(f"{path}: {len(missing)} of its {len(parts)} parts are missing ({missing[0]}). Fetch them too.")
    if missing:
        raise UserError(f"{path} is no file. Fetch it, or mend the path.")
    return parts


def parts_of(path: Path) -> list[Path]:
    """The files of a GGUF model by the name of its first, there or not. `UserError` for another part's name."""
    split = PART.search(path.name)
    if not split:
        return [path]
    number, count = int(split[1]), int(split[2])
    stem = path.name[: split.start()]
    parts = [path.with_name(f"{stem}-{place:05}-of-{count:05}.gguf") for place in range(1, count + 1)]
    if number != 1:
        raise UserError(f"{path} is part {number} of {count}: name the first, {stem}-00001-of-{count:05}.gguf")
    return parts


def _check_model(path: Path, readers: list[Any]) -> None:
    named = isinstance(field_of(readers[0], "general.architecture"), str)
    if not named or not any(reader.tensors for reader in readers):
        raise UserError(f"{path} holds no model: no tensors, or no `general.architecture`.")


def _opened(path: Path) -> Any:
    with importing("gguf", "pip install gguf"):
        import gguf
    size_bytes = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with 'GGUF'). Fetch it again.")
    cut = UserError(
        f"{path} is truncated or damaged: its {size_bytes} bytes do not hold the tensors it lists. Fetch it again."
    )
    try:
        header_bytes(path)
        reader = gguf.GGUFReader(path)
        end = 0
        for tensor in reader.tensors:
            if int(tensor.data_offset) != reader.data_offset + end or not tensor.n_elements:
                raise cut
            end += -(-int(tensor.n_bytes) // reader.alignment) * reader.alignment
        # The last tensor's padding may be missing.
        if not 0 <= reader.data_offset + end - size_bytes < reader.alignment and reader.tensors:
            raise cut
        for field in reader.fields.values():
            if len(field.types) == 1:
                field.contents()  # a text that is none
        if not all(type(field_of(reader, key, 0)) is int for key in ("split.count", "split.no")):
            raise cut
    except Exception:  # of a parser that trusts its input: whatever a wrong byte led to
        raise cut from None
    return reader


def header_bytes(path: Path) -> int:
    """Where a header ends, by its counts and lengths; raises whatever a read beyond the file raises."""
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def after_string(at: int) -> int:
            return at + 8 + int(struct.unpack_from("<Q", data, at)[0])

        def after_value(at: int, kind: int) -> int:
            if kind == 8:
                return after_string(at)
            if kind != 9:
                return at + SCALAR_BYTES[kind]
            item, count = struct.unpack_from("<IQ", data, at)
            at += 12
            if item in SCALAR_BYTES:
                return at + int(count) * SCALAR_BYTES[item]
            if item != 8:
                raise ValueError("an array of arrays")
            for _ in range(count):
                at = after_string(at)
            return at

        tensors, fields = struct.unpack_from("<QQ", data, 8)
        at = 24
        for _ in range(fields):
            at = after_string(at)
            at = after_value(at + 4, struct.unpack_from("<I", data, at)[0])
        for _ in range(tensors):
            at = after_string(at)
            (dimensions,) = struct.unpack_from("<I", data, at)
            if not 1 <= dimensions <= DIMENSIONS:
                raise ValueError("a tensor of more dimensions than there are")
            at += 4 + 8 * dimensions + 12
        if at > len(data):
            raise ValueError("a header longer than the file")
        return at


@contextmanager
def parsed_once(path: Path, reader: Any) -> Iterator[None]:
    """Answer transformers' own calls of the `gguf` package from what is read already.

    It parses the whole file at each of four steps and builds the table of names for every module of the model: of a
    small model's half minute, two thirds.
    """
    import gguf

    before = {name: vars(gguf)[name] for name in ("GGUFReader", "get_tensor_name_map")}

    def parsed(asked: Any, *rest: Any) -> Any:
        return reader if Path(asked).resolve() == path.resolve() else before["GGUFReader"](asked, *rest)

    vars(gguf).update(GGUFReader=parsed, get_tensor_name_map=cache(before["get_tensor_name_map"]))
    try:
        yield
    finally:
        vars(gguf).update(before)


def field_of(reader: Any, key: str, default: Any = None) -> Any:
    """A field of a GGUF file's metadata."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def bytes_by_type(reader: Any) -> dict[str, int]:
    """How many bytes of a GGUF file's tensors are of each type."""
    found: dict[str, int] = {}
    for tensor in reader.tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return found
