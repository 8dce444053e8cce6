"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from workbench.errors import UserError, short

UNITS = (
    {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
    | {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
    | {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
)
"""Bytes of each unit, by its name in small letters: nobody means bits."""


def size_text(size_bytes: float) -> str:
    """`1.50 GiB`, and below one `730 MiB`."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else mib_text(size_bytes, 0)


def mib_text(size_bytes: float, digits: int = 1) -> str:
    """`730.4 MiB`: the same unit for any size, where two are to be compared."""
    return f"{size_bytes / 2**20:.{digits}f} MiB"


def parse_size(text: str, option: str) -> int:
    """`8GiB`, `8 gb`, `800M` in bytes; a bare number is refused, because nobody knows what it means.

    By hand because `pydantic.ByteSize` takes a bare number for bytes, and reads `8G` as 8e9.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise UserError(f"{option} {short(text)}: write a size with its unit, such as 8GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2].lower()])
