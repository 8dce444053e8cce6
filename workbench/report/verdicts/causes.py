"""Why many things changed at once. A new version of an engine makes a change in every variant that it runs: they are
told together, by engine, machine and night, under a line that says what else differs between the two measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

from workbench.records import Row

Versions = Mapping[str, str]
Changed = dict[str, tuple[str, str]]
"""By what a row says it ran with, before and after; empty where it said nothing."""
Thing = TypeVar("Thing")


def known_versions(row: Row) -> dict[str, str]:
    """What a row ran with: versions of engine and program, the commit, the GPU's driver, the system."""
    about = {"driver": row.machine.driver, "system": row.machine.system, "python": row.machine.python}
    return row.versions | {name: found for name, found in about.items() if found}


def differing(old: Versions, new: Versions) -> Changed:
    """What differs between two measurements."""
    both = {name: (old.get(name, ""), new.get(name, "")) for name in dict.fromkeys([*old, *new])}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def spoken(changed: Iterable[Changed]) -> str:
    """`changed with it: commit aaaa -> bbbb, torch 2.12 -> 2.13`, of all that changed with any."""
    found = {name: pair for each in changed for name, pair in each.items()}
    told = ", ".join(f"{name} {old or '?'} -> {new or '?'}" for name, (old, new) in found.items())
    return f"changed with it: {told}" if told else "no version changed with it"


def grouped(things: Iterable[Thing], cause: Callable[[Thing], Hashable]) -> list[list[Thing]]:
    """Things of one cause together, in the order first seen."""
    found: dict[Hashable, list[Thing]] = {}
    for thing in things:
        found.setdefault(cause(thing), []).append(thing)
    return list(found.values())
