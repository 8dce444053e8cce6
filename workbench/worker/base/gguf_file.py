"""A GGUF file, opened: whole, laid out as llama.cpp lays it out, and each of its fields and tensors there to be read.

The `gguf` package's reader trusts what it reads: a count with one bit turned makes it loop for hours, and tensors
may lie on top of each other. So the header's skeleton is walked first, within the file's bounds.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from workbench.errors import UserError, install_with

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by GGUF's number of its type; 8 is a string, 9 an array."""

DIMENSIONS = 4
"""Most dimensions of a tensor (`GGML_MAX_DIMS`)."""


def open_gguf(path: Path) -> Any:
    """A GGUF file's reader, all tensors inside the file, one after the other. `UserError` for any that is not whole."""
    try:
        import gguf
    except ImportError:
        raise install_with("gguf", "pip install gguf") from None
    size_bytes = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with 'GGUF'). Fetch it again.")
    cut = UserError(
        f"{path} is truncated or damaged: its {size_bytes} bytes do not hold the tensors it lists. Fetch it again."
    )
    try:
        _walk(path)
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
        split = reader.get_field("split.count")
        parts = 1 if split is None else int(split.contents())
    except Exception:  # of a parser that trusts its input: whatever a wrong byte led to
        raise cut from None
    if parts > 1:
        raise UserError(f"{path} is one part of {parts}: join them with llama.cpp's `llama-gguf-split --merge` first.")
    if not reader.tensors or not isinstance(field_of(reader, "general.architecture"), str):
        raise UserError(f"{path} holds no model: no tensors, or no `general.architecture`.")
    return reader


def _walk(path: Path) -> None:
    """Go through a header's counts and lengths; raises whatever a read beyond the file raises."""
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
