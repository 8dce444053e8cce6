"""One HTML page that needs nothing else: the table, the plots, and where the numbers come from.

No network, no library: style, script and plots are in the page, and its content policy forbids the rest. The table
sorts and filters; what is filtered out leaves the plots too. Numbers carry the stored value in full (`data-v`), so that
what is seen can be checked. What it looks like is `page.html`, `page.css` and `page.js`.
Rejected: a charting library (plotly alone is larger than the whole page may be) and a framework.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.report.site.columns import columns
from workbench.report.site.plots import groups_of, plots, row_ids
from workbench.report.site.templates import fill
from workbench.report.table import Table, shared_settings, workload
from workbench.report.verdicts.steps import Series, Step


def page(
    table: Table,
    series: Sequence[Series] = (),
    steps: Sequence[Step] = (),
    *,
    title: str = "",
    back: str | None = None,
) -> str:
    """The whole page as text; `series` of several runs bring plots over time, `back` a link to where it is listed."""
    bases = dict.fromkeys(line.row.base for line in table.lines)
    newest = max(line.row.started_at for line in table.lines)
    ran = sum(bool(line.row.measurement) for line in table.lines)
    return fill(
        "page.html",
        title=title or f"{', '.join(bases)} on {table.machine}",
        subtitle=f"{ran} of {len(table.lines)} pairs of variant and engine ran; newest row {newest}",
        back=back,
        table=table,
        heads=["variant", "engine", *(column.name for column in table.varying)],
        columns=columns(table),
        ids=row_ids(table),
        engines=groups_of(table),
        plots=plots(table, series, steps),
        steps=[step for step in steps if step.worse],
        origin=_origin(table),
    )


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
