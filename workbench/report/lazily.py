"""A mapping that computes what it is asked for: a table shows a few of the columns that a row could have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value")


class Lazily(Mapping[str, Value]):
    """What `read` says of each name, asked once and only if somebody wants it."""

    def __init__(self, names: Collection[str], read: Callable[[str], Value]) -> None:
        self._names, self._read = names, read
        self._found: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self._found:
            if name not in self._names:
                raise KeyError(name)
            self._found[name] = self._read(name)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
