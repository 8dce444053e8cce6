"""The table for a terminal."""

from __future__ import annotations

from workbench.records import Row
from workbench.report.formats.cells import remarks_of, short_text, shown_columns, subtitle, title_of
from workbench.report.selection import BASE
from workbench.report.table import Line, Table

WIDEST_TEXT = 120
"""Characters a line of prose under the table may have; the table itself may have more."""


def terminal(table: Table, width: int | None = None) -> str:
    """The table for people, `width` characters wide (default: the terminal's; as wide as it likes in a pipe).

    Where that is too narrow, the spread of the speeds is left out first (and the errors of the divergence), then
    divergence and agreement, then the perplexity's error.
    Numbers are never cut or wrapped, so a still narrower terminal gets longer lines.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console(highlight=False)
    if width is None:
        width = console.width if console.is_terminal else 1000
    for detail in (3, 2, 1, 0):
        columns = shown_columns(table, detail)
        grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for column in columns:
            heading = Text("\n".join(column.heading))
            grid.add_column(heading, justify="right" if column.number else "left", no_wrap=True, vertical="bottom")
        for place, line in enumerate(table.lines):
            cells = [Text(column.cells[place]) for column in columns]
            if place and _group(table.lines[place - 1].row) == _group(line.row):
                cells[0] = Text("")
            grid.add_row(*cells, style=_style(line))
        console.width = 100_000  # the measure is clipped to the console
        needed = Measurement.get(console, console.options, grid).maximum
        if needed <= width:
            break

    reasons = Grid.grid(padding=(0, 1, 0, 0))
    for number, reason in enumerate(table.footnotes, start=1):
        reasons.add_row(Text(f"[{number}]"), Text(short_text(reason), overflow="fold"))
    with console.capture() as captured:
        console.width = min(width, WIDEST_TEXT)
        console.print(Text(title_of(table), style="bold"))
        for text in subtitle(table):
            console.print(Text(text, style="dim"))
        console.print()
        console.width = max(width, needed)
        console.print(grid)
        console.width = min(width, WIDEST_TEXT)
        console.print()
        for text in remarks_of(table):
            console.print(Text(text))
        if table.footnotes:
            console.print(reasons)
    return "\n".join(text.rstrip() for text in captured.get().rstrip().split("\n")) + "\n"


def _group(row: Row) -> tuple[str, str]:
    return row.base, row.artifact.variant


def _style(line: Line) -> str | None:
    if line.row.error:
        return "red"
    if line.row.unsupported:
        return "dim"
    return "bold" if line.row.artifact.method == BASE else None
