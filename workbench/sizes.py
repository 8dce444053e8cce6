"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from workbench.errors import UserError, short

UNITS = (
    {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    | {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    | {"K": 2**10, "M": 2**20, "G": 2**30}
)


def size_text(size_bytes: float) -> str:
    """`1.50 GiB`, and below one `730 MiB`."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else mib_text(size_bytes, 0)


def mib_text(size_bytes: float, digits: int = 1) -> str:
    """`730.4 MiB`: the same unit for any size, where two are to be compared."""
    return f"{size_bytes / 2**20:.{digits}f} MiB"


def parse_size(text: str, option: str) -> int:
    """`8GiB`, `8 GB`, `800M` in bytes; a bare number is refused, because nobody knows what it means.

    By hand because `pydantic.ByteSize` takes a bare number for bytes, and reads `8G` as 8e9.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2] not in UNITS:
        raise UserError(f"{option} {short(text)}: write a size with its unit, such as 8GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2]])
