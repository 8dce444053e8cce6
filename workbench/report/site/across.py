"""The same variants in the same engines on other machines: how fast each runs them, and what memory it takes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.records import Row
from workbench.report.selection import Pair, pair_of
from workbench.report.site.columns import PageColumn, columns
from workbench.report.store import machine_of
from workbench.report.table import Line, Table, build

SHOWN = ("decode_tok_s", "peak_vram_bytes", "peak_rss_bytes", "kld_mean")
"""What differs between machines, or might. Files, and so sizes, are the same."""


@dataclass(frozen=True)
class Across:
    """A table with a group of columns for each machine."""

    machines: tuple[str, ...]
    columns: tuple[PageColumn, ...]
    """Of each machine."""
    rows: tuple[tuple[Line, tuple[Line | None, ...]], ...]
    """A line of this machine, and what each machine has of it."""


def across(table: Table, others: Sequence[Table]) -> Across | None:
    """What other machines ran too, with the same options and workload; None if that is nothing."""
    found = {each.machine: _by_pair(each, table) for each in (table, *others)}
    own = found[table.machine]
    machines = [name for name, lines in found.items() if lines.keys() & own.keys()]
    if len(machines) < 2:
        return None
    shared = [pair for pair in own if any(pair in found[name] for name in machines if name != table.machine)]
    shown = [column for column in columns(table) if column.name in SHOWN and column.shown != "asked"]
    rows = [(own[pair], tuple(found[name].get(pair) for name in machines)) for pair in shared]
    return Across(tuple(machines), tuple(shown), tuple(rows))


def elsewhere(table: Table, rows: Sequence[Row]) -> list[Table]:
    """The newest tables of the same bases on other machines."""
    bases = {line.row.base for line in table.lines}
    by_machine: dict[str, list[Row]] = {}
    for row in rows:
        if row.base in bases:
            by_machine.setdefault(machine_of(row), []).append(row)
    return [build(own) for machine, own in sorted(by_machine.items()) if machine != table.machine]


def _by_pair(table: Table, like: Table) -> dict[Pair, Line]:
    """The lines that ran, and were measured as those of another table were."""
    version = like.lines[0].row.measurement_version
    lines = [line for line in table.lines if line.row.measurement and line.row.measurement_version == version]
    return {pair_of(line.row): line for line in lines}
