"""The table as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from workbench.report.formats.cells import shown_columns
from workbench.report.formats.prose import footnotes_of, remarks_of, subtitle, title_of
from workbench.report.table import Table


def markdown(table: Table, names: Sequence[str] = ()) -> str:
    """The table as GitHub-flavoured Markdown, aligned in the source too, with its footnotes as a numbered list; with
    the columns of these keys of `data.flattened` if any are named."""
    columns, shown = [], shown_columns(table, names)
    for column in shown:
        name, unit = column.heading[:-1], column.heading[-1]
        heading = f"{' '.join(name)} ({unit})" if name else unit
        columns.append([_escaped(heading), *map(_escaped, column.cells)])
    numbers = [column.number for column in shown]
    widths = [max(3, *map(len, column)) for column in columns]
    lines = [f"### {_escaped(title_of(table))}", "", *(f"{_escaped(text)}  " for text in subtitle(table)), ""]
    for place in range(len(columns[0])):
        cells = [
            column[place].rjust(width) if number else column[place].ljust(width)
            for column, width, number in zip(columns, widths, numbers, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if place == 0:
            rules = [
                "-" * (width - 1) + (":" if number else "-") for width, number in zip(widths, numbers, strict=True)
            ]
            lines.append(f"| {' | '.join(rules)} |")
    remarks = remarks_of(table)
    if remarks:
        lines += ["", *(f"- {_escaped(text)}" for text in remarks)]
    if notes := footnotes_of(table):
        lines += ["", *(f"{n}. {_escaped(text)}" for n, text in enumerate(notes, start=1))]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text that markdown shows as it is; an underscore inside a word never marks emphasis and stays."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
