"""Numbers as people read them."""

from __future__ import annotations

from workbench.sizes import mib_text

MIB = 2.0**20


def amount(value: float, unit: str) -> str:
    """A number with its unit as people read it: bytes as MiB."""
    if unit == "B":
        return mib_text(value)
    return f"{value:.4g} {unit}".rstrip()


def printable(words: str) -> str:
    """One line without control characters: names come out of files."""
    return "".join(mark if mark.isprintable() else " " for mark in words)
