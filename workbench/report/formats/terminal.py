"""The table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workbench.records import Row
from workbench.report.formats.cells import TextColumn, shown_columns, shown_lines
from workbench.report.formats.fit import fitted
from workbench.report.formats.prose import footnotes_of, remarks_of, subtitle, title_of
from workbench.report.selection import BASE
from workbench.report.table import Line, Table

WIDEST_TEXT = 120
"""Characters a line of prose under the table may have; the table itself may have more."""


def terminal(table: Table, columns: Sequence[str] = (), width: int | None = None) -> str:
    """The table for people, `width` characters wide (default: the terminal's; as wide as it likes in a pipe), with the
    columns of these keys of `data.flattened` if any are named.

    Where that is too narrow, columns and errors go in the order of their ranks, and a line says which. Numbers are
    never cut or wrapped.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False, force_jupyter=False)
    if width is None:
        width = console.width if console.is_terminal else 1000
    shown, left_out = fitted(shown_columns(table, columns), width)
    grid = _grid(shown_lines(table.lines), shown)
    needed = cell_len(grid[0][0])
    remarks = remarks_of(table)
    if left_out:
        remarks.insert(0, f"left out at {width} columns: {', '.join(left_out)} (all of it: `| less -S`, or --columns)")

    reasons = Grid.grid(padding=(0, 1, 0, 0))
    for number, reason in enumerate(notes := footnotes_of(table), start=1):
        reasons.add_row(Text(f"[{number}]"), Text(reason, overflow="fold"))
    with console.capture() as captured:
        console.width = min(width, WIDEST_TEXT)
        console.print(Text(title_of(table), style="bold"))
        for text in subtitle(table):
            console.print(Text(text, style="dim"))
        console.print()
        console.width = max(width, needed)
        for text, style in grid:
            console.print(Text(text, style=style or "", no_wrap=True, overflow="ignore"), crop=False)
        console.width = min(width, WIDEST_TEXT)
        console.print()
        for text in remarks:
            console.print(Text(text))
        if notes:
            console.print(reasons)
    return "\n".join(text.rstrip() for text in captured.get().rstrip().split("\n")) + "\n"


def so_far(table: Table, newest: Row, width: int, height: int) -> list[tuple[str, str | None]]:
    """The table without its prose while its rows come: lines and their styles, as many as `height` has room for.

    Where there are more, those around the `newest` row stay, and the last line says how many of all they are.
    """
    lines = shown_lines(table.lines)
    columns = [column for column in shown_columns(table) if column.heading != ("note",)]
    room, many = height - 1 - max(len(column.heading) for column in columns), len(lines)
    if many > room:
        room = max(room - 1, 1)
        place = next((k for k, line in enumerate(lines) if line.row.key == newest.key), 0)
        first = min(max(place - room // 2, 0), many - room)
        kept = slice(first, first + room)
        lines = lines[kept]
        columns = [replace(column, cells=column.cells[kept], bare=column.bare[kept]) for column in columns]
    grid = _grid(lines, fitted(columns, width)[0])
    return grid if len(lines) == many else [*grid, (f"{len(lines)} of {many} rows (all: `workbench table`)", "dim")]


def _grid(lines: Sequence[Line], columns: Sequence[TextColumn]) -> list[tuple[str, str | None]]:
    """The lines with their styles, heading first. By hand: rich takes a millisecond a line for its own grid."""
    from rich.cells import cell_len

    height = max(len(column.heading) for column in columns)
    stacked = []
    for place, column in enumerate(columns):
        cells = [*[""] * (height - len(column.heading)), *column.heading, *column.cells]
        if place == 0:  # a variant is named once, above its further engines
            groups = [_group(line.row) for line in lines]
            for i in range(len(groups) - 1, 0, -1):
                if groups[i] == groups[i - 1]:
                    cells[height + i] = ""
        breadths = [cell_len(cell) for cell in cells]
        most = max(breadths)
        padded = [
            " " * (most - breadth) + cell if column.number else cell + " " * (most - breadth)
            for cell, breadth in zip(cells, breadths, strict=True)
        ]
        stacked.append(padded)
    texts = ["  ".join(cells) for cells in zip(*stacked, strict=True)]
    styles = ["bold"] * height + [_style(line) for line in lines]
    styled = list(zip(texts, styles, strict=True))
    return [*styled[:height], ("─" * cell_len(texts[0]), None), *styled[height:]]


def _group(row: Row) -> tuple[str, str]:
    return row.base, row.artifact.variant


def _style(line: Line) -> str | None:
    if line.row.error:
        return "red"
    return "bold" if line.row.artifact.method == BASE else None
