"""Which columns, and which errors beside their numbers, a width has room for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workbench.report.formats.cells import STAYS, TextColumn

GAP = 2
"""Spaces between two columns."""
SHORTEST = 12
"""Characters that a name keeps, at the least, where nothing else can go."""


def fitted(columns: Sequence[TextColumn], width: int) -> tuple[list[TextColumn], list[str]]:
    """The columns as they fit, and the names of what was left out (`load`, `± of ppl`).

    What ranks least goes first, errors and whole columns alike; then what there is room for again comes back, the last
    to go first, and no column before one that ranks higher. If even what stays is too wide, names are cut in their
    middle.
    """
    full = [_breadth(column, column.cells) for column in columns]
    bare = [_breadth(each, each.bare) if each.bare else most for each, most in zip(columns, full, strict=True)]
    taken = list(full)
    steps = [(column.rank, place, 0) for place, column in enumerate(columns) if column.rank < STAYS]
    steps += [(c.bare_rank, place, bare[place]) for place, c in enumerate(columns) if c.bare and c.bare_rank < STAYS]

    def room() -> int:
        return width - sum(taken) - GAP * (sum(map(bool, taken)) - 1)

    for _, place, breadth in sorted(steps, key=lambda step: step[0]):
        if room() >= 0:
            break
        taken[place] = min(taken[place], breadth)
    waiting = False
    for _, place, _ in sorted(steps, key=lambda step: -step[0]):
        before = taken[place]
        for breadth in (full[place], bare[place]) if before or not waiting else ():
            taken[place] = max(before, breadth)
            if room() >= 0:
                break
            taken[place] = before
        waiting = waiting or not taken[place]
    shown, left_out = [], []
    for column, breadth, most in zip(columns, taken, full, strict=True):
        if not breadth:
            left_out.append(column.name)
        elif breadth < most:
            left_out.append(f"± of {column.name}")
            column = replace(column, cells=column.bare)
        if breadth:
            shown.append(column)
    if room() < 0 and shown:
        shown[0] = _cut(shown[0], max(SHORTEST, full[0] + room()))
    return shown, left_out


def _breadth(column: TextColumn, cells: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, (*column.heading, *cells)))


def _cut(column: TextColumn, longest: int) -> TextColumn:
    half = (longest - 1) // 2
    cut = [cell if len(cell) <= longest else f"{cell[: longest - 1 - half]}…{cell[-half:]}" for cell in column.cells]
    return replace(column, cells=tuple(cut))
