"""One HTML page that needs nothing else: the table, the plots, and where the numbers come from.

No network, no library: style, script and plots are in the page, and its content policy forbids the rest. The table
sorts and filters; what is filtered out leaves the plots too. Numbers carry the stored value in full (`data-v`), so that
what is seen can be checked. What it looks like is `page.html`, `page.css` and `page.js`.
Rejected: a charting library (plotly alone is larger than the whole page may be) and a framework.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.records import Row
from workbench.report import forms
from workbench.report.formats.data import comma_separated
from workbench.report.site.across import across
from workbench.report.site.choice import choices
from workbench.report.site.columns import columns
from workbench.report.site.plots import groups_of, plots, row_ids
from workbench.report.site.templates import fill
from workbench.report.site.words import full_name
from workbench.report.store import machine_of
from workbench.report.table import Line, Table, shared_settings, workload
from workbench.report.verdicts.steps import Series, Step
from workbench.report.verdicts.wish import FIRST
from workbench.sizes import mib_text


def page(
    table: Table,
    series: Sequence[Series] = (),
    steps: Sequence[Step] = (),
    *,
    title: str = "",
    back: str | None = None,
    rows_file: str | None = None,
    others: Sequence[Table] = (),
    command: Callable[[Row], str | None] = lambda row: None,
) -> str:
    """The whole page as text.

    `series` of several runs bring plots over time, `back` a link to where it is listed, `rows_file` one to the rows
    themselves; `others` are other machines' tables; `command` says how to serve what a row is of.
    """
    bases = dict.fromkeys(line.row.base for line in table.lines)
    newest = max(line.row.started_at for line in table.lines)
    ran = sum(bool(line.row.measurement) for line in table.lines)
    return fill(
        "page.html",
        title=title or f"{', '.join(bases)} on {table.machine}",
        subtitle=f"{ran} of {len(table.lines)} pairs of variant and engine ran; newest row {newest}",
        back=back,
        table=table,
        columns=columns(table),
        ids=row_ids(table),
        engines=groups_of(table),
        plots=plots(table, series, steps),
        choices=choices(table, command),
        firsts=FIRST,
        across=across(table, others),
        details=details(table, command),
        csv=b64encode(comma_separated(table).encode()).decode(),
        rows_file=rows_file,
        steps=[step for step in steps if step.worse],
        origin=_origin(table),
    )


@dataclass(frozen=True)
class Details:
    """A row in full, for who wants to have it: how to serve it, and what exactly it is."""

    id: str
    title: str
    command: str | None
    facts: list[tuple[str, str]]


def details(table: Table, command: Callable[[Row], str | None]) -> list[Details]:
    """Every line's row in full."""
    ids = row_ids(table)
    return [_details(line, ids[line.row.key], full_name(table, line), command) for line in table.lines]


def _details(line: Line, id: str, title: str, command: Callable[[Row], str | None]) -> Details:
    row = line.row
    artifact, settings = row.artifact, row.measurement.settings if row.measurement else row.options
    bits = f", {artifact.bits_per_weight:.3f} bits a weight" if artifact.bits_per_weight else ""
    size = f"{artifact.disk_bytes:,} bytes ({mib_text(artifact.disk_bytes)}){bits}"
    facts = [
        ("file", artifact.path.rpartition("/")[2]),
        ("weights", size if artifact.disk_bytes else ""),
        ("in the engine", forms.words(row) if row.measurement else ""),
        ("made from", artifact.digest),
        ("versions", ", ".join(f"{name} {version}" for name, version in row.versions.items())),
        ("ran with", ", ".join(f"{name} {_brief(value)}" for name, value in settings.items() if value is not None)),
        ("measured", f"{row.started_at} on {machine_of(row)}"),
        ("cannot run", row.unsupported or ""),
        ("failed", row.error or ""),
        *(("note", warning) for warning in line.warnings),
    ]
    serving = command(row) if row.measurement else None
    return Details(id, title, serving, [fact for fact in facts if fact[1]])


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _origin(table: Table) -> list[tuple[str, str]]:
    """Machine, versions, recipe, tokens and settings: what the numbers rest on."""
    rows = [line.row for line in table.lines]
    newest = max(rows, key=lambda row: row.started_at)
    machine = newest.machine
    items: list[tuple[str, str]] = [("machine", table.machine)]
    if machine.cpu:
        memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if machine.memory_bytes else ""
        items.append(("processor", f"{machine.cpu}, {machine.threads or '?'} threads{memory}"))
    items += [("GPU", f"{gpu.name}, driver {machine.driver}") for gpu in machine.gpus]
    if machine.system:
        items.append(("system", f"{machine.system}, Python {machine.python or '?'}"))
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        for name, version in row.versions.items():
            versions.setdefault(name, {})[version] = None
    items.append(("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())))
    items.append(("recipe", ", ".join(dict.fromkeys(f"{row.recipe} ({row.recipe_digest})" for row in rows))))
    points = dict.fromkeys("{} prompt tokens, {} new ones, batch {}".format(*workload(row)) for row in rows)
    items.append(("workload", "; ".join(points) + f"; {newest.workload.repeats} repeats"))
    if e := table.first.evaluation:
        windows = f"{e.windows} windows of {e.window} tokens, {e.score} scored, {e.scored_tokens} tokens"
        items.append(("evaluation", f"{e.name} ({e.digest[:16]}): {windows}"))
    items.append(("measured", f"{min(row.started_at for row in rows)} to {newest.started_at}"))
    items.append(("measurement version", str(newest.measurement_version)))
    for backend, shared in shared_settings(table).items():
        if shared:
            items.append((f"{backend} ran with", ", ".join(f"{name} {value}" for name, value in shared.items())))
    return items
