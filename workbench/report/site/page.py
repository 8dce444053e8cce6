"""One HTML page that needs nothing else: the table, the plots, and where the numbers come from.

No network, no library: style, script and plots are in the page, and its content policy forbids the rest. The table
sorts and filters; what is filtered out leaves the plots too. Everything that came out of a recipe, an engine or a
file is escaped. Numbers carry the stored value in full (`data-v`), so that what is seen can be checked.
Rejected: a charting library (plotly alone is larger than the whole page may be) and a framework.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from workbench.records import Row
from workbench.report import units
from workbench.report.metrics import METRICS
from workbench.report.selection import BASE
from workbench.report.site.columns import columns
from workbench.report.site.plots import Plot, groups_of, is_count, plots, row_ids
from workbench.report.site.style import CSS, SCRIPT
from workbench.report.table import Table, workload
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
    ids = row_ids(table)
    groups = groups_of(table)
    title = title or _title(table)
    link = f'<p><a href="{_e(back)}">All machines and recipes</a></p>' if back else ""
    parts = [
        f"<header>{link}<h1>{_e(title)}</h1><p class=soft>{_e(_subtitle(table))}</p></header><main>",
        _steps_section(steps),
        _table_section(table, ids, groups),
        "<section aria-labelledby=plots><h2 id=plots>Plots</h2><div class=plots>",
        *(_figure(plot) for plot in plots(table, series, steps)),
        "</div></section>",
        _floor_section(table),
        _origin_section(table),
        "</main>",
    ]
    return document(title, "".join(parts), script=SCRIPT)


def document(title: str, body: str, script: str = "") -> str:
    """A page with the house's style around a body that is HTML already."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self' data:"
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{_e(title)}</title><style>{CSS}</style></head>\n<body>{body}{code}</body></html>\n"
    )


def _table_section(table: Table, ids: dict[str, str], groups: Sequence[str]) -> str:
    shown = columns(table)
    heads = ["variant", "engine", *(column.name for column in table.varying)]
    cells = [f"<th scope=col aria-sort=none><button type=button>{_e(head)}</button></th>" for head in heads]
    for column in shown:
        unit = f" <small>{_e(column.unit)}</small>" if column.unit else ""
        help = f' title="{_e(column.help)}"' if column.help else ""
        cells.append(
            f"<th scope=col aria-sort=none class=n><button type=button{help}>{_e(column.heading)}{unit}</button></th>"
        )
    cells.append("<th scope=col>note</th>")
    body = []
    for line in table.lines:
        row = line.row
        state = "no" if row.unsupported else "bad" if row.error else "base" if row.artifact.method == BASE else ""
        first = [row.artifact.variant, row.backend, *(column.text(row) for column in table.varying)]
        tds = [f"<th scope=row>{_e(first[0])}</th>", *(f"<td>{_e(text) or '–'}</td>" for text in first[1:])]
        for column in shown:
            value = column.value(line)
            if value is None or not math.isfinite(value):
                tds.append("<td class=n>–</td>")
                continue
            error = column.error(line)
            small = f" <small>{_e(error)}</small>" if error else ""
            tds.append(f'<td class=n data-v="{value!r}">{_e(column.show(value))}{small}</td>')
        words = "cannot run " if row.unsupported else "failed " if row.error else ""
        notes = " ".join(f'<a href="#n{n}">{n}</a>' for n in line.footnotes)
        tds.append(f"<td>{words}{notes}</td>")
        look = f"{row.artifact.variant} {row.backend} {row.artifact.method} {row.base}".lower()
        body.append(
            f'<tr data-r="{ids[row.key]}" data-g="{_e(row.backend)}" data-m="{int(bool(row.measurement))}" '
            f'data-s="{_e(look)}" class="{state}">{"".join(tds)}</tr>'
        )
    boxes = "".join(
        f'<label><input type=checkbox class=engine value="{_e(group)}" checked> {_e(group)}</label>' for group in groups
    )
    notes = "".join(f'<li id="n{n}">{_e(text)}</li>' for n, text in enumerate(table.footnotes, start=1))
    remarks = "".join(f"<li>{_e(text)}</li>" for text in table.notes)
    return (
        "<section aria-labelledby=table><h2 id=table>Table</h2>"
        "<form class=filters onsubmit='return false'>"
        "<label>Filter <input type=search id=find placeholder='variant, method, engine' autocomplete=off></label>"
        f"<fieldset><legend>Engines</legend>{boxes}</fieldset>"
        "<label><input type=checkbox id=measured> only what ran</label>"
        "<output id=count aria-live=polite></output></form>"
        "<div class=scroll tabindex=0 role=region aria-labelledby=table>"
        f"<table id=rows><thead><tr>{''.join(cells)}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        + (f"<ol class=notes>{notes}</ol>" if notes else "")
        + (f"<ul class=notes>{remarks}</ul>" if remarks else "")
        + "</section>"
    )


def _figure(plot: Plot) -> str:
    return (
        f'<figure id="plot-{_e(plot.name)}"><figcaption><b>{_e(plot.title)}.</b> {_e(plot.caption)}</figcaption>'
        f"<div class=wide>{plot.wide}</div><div class=narrow>{plot.narrow}</div></figure>"
    )


def _steps_section(steps: Sequence[Step]) -> str:
    worse = [step for step in steps if step.worse]
    if not worse:
        return ""
    return f"<section aria-labelledby=steps><h2 id=steps>Regressions</h2>{steps_list(worse)}</section>"


def steps_list(steps: Sequence[Step]) -> str:
    """Regressions as an HTML list: what, how much, since when, and what had changed."""
    items = []
    for step in sorted(steps, key=lambda one: one.first.at, reverse=True):
        unit = METRICS[step.metric].unit
        changed = ", ".join(f"{name} {old or '?'} → {new or '?'}" for name, (old, new) in step.changed.items())
        items.append(
            f"<li><b>{_e(step.series.label)}</b>: {_e(METRICS[step.metric].title)} "
            f"<span data-v='{step.before!r}'>{_e(units.amount(step.before, unit))}</span> → "
            f"<span data-v='{step.after!r}'>{_e(units.amount(step.after, unit))}</span> "
            f"({100 * step.relative:+.1f} %) since "
            f"<time datetime='{_e(step.first.at)}'>{_e(step.first.at[:10])}</time>; "
            f"{'changed with it: ' + _e(changed) if changed else 'no version changed with it'}"
            f"{'' if step.open else ' <em>(mended since)</em>'}</li>"
        )
    return f"<ul class=steps>{''.join(items)}</ul>"


def _floor_section(table: Table) -> str:
    items = []
    for floor in table.first.noise_floors:
        items.append(
            f"<li>{_e(floor.base)} itself has perplexity <span data-v='{floor.low!r}'>{floor.low:.4f}</span> to "
            f"<span data-v='{floor.high!r}'>{floor.high:.4f}</span> on {_e(', '.join(floor.backends))}, "
            f"{100 * floor.relative:.3f} % apart: a smaller difference may be the engine's.</li>"
        )
        for backend, value in floor.divergences:
            items.append(
                f"<li>Divergence of {_e(floor.base)} from its own reference on {_e(backend)}: "
                f"<span data-v='{value!r}'>{value:.1e}</span> nats a token.</li>"
            )
    if not items:
        items.append("<li>Unknown: the base itself was not scored on two engines.</li>")
    return f"<section aria-labelledby=floor><h2 id=floor>Noise floor</h2><ul>{''.join(items)}</ul></section>"


def _origin_section(table: Table) -> str:
    """Machine, versions, recipe, tokens and settings: what the numbers rest on."""
    rows = [line.row for line in table.lines]
    newest = max(rows, key=lambda row: row.started_at)
    machine = newest.machine
    items: list[tuple[str, str]] = [("machine", table.machine)]
    if machine.cpu:
        memory = f", {machine.memory_bytes / 2**30:.0f} GiB" if is_count(machine.memory_bytes) else ""
        items.append(("processor", f"{machine.cpu}, {machine.threads or '?'} threads{memory}"))
    items += [("GPU", f"{gpu.name}, driver {machine.driver}") for gpu in machine.gpus]
    if machine.system:
        items.append(("system", f"{machine.system}, Python {machine.python or '?'}"))
    versions: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row.versions.items():
            if version not in versions.setdefault(name, []):
                versions[name].append(version)
    items.append(("versions", ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())))
    recipes = dict.fromkeys(f"{row.recipe} ({row.recipe_digest})" for row in rows)
    items.append(("recipe", ", ".join(recipes)))
    points = dict.fromkeys("{} prompt tokens, {} new ones, batch {}".format(*workload(row)) for row in rows)
    items.append(("workload", "; ".join(points) + f"; {newest.workload.repeats} repeats"))
    if table.first.evaluation:
        e = table.first.evaluation
        items.append(
            (
                "evaluation",
                f"{e.name} ({e.digest[:16]}): {e.windows} windows of {e.window} tokens, {e.score} scored, "
                f"{e.scored_tokens} tokens",
            )
        )
    items.append(("measured", f"{min(row.started_at for row in rows)} to {newest.started_at}"))
    items.append(("measurement version", str(newest.measurement_version)))
    items += _settings(rows)
    body = "".join(f"<dt>{_e(name)}</dt><dd>{_e(value)}</dd>" for name, value in items)
    return f"<section aria-labelledby=origin><h2 id=origin>Where the numbers come from</h2><dl>{body}</dl></section>"


def _settings(rows: Sequence[Row]) -> list[tuple[str, str]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.measurement:
            found.setdefault(row.backend, []).append(row.measurement.settings)
    items = []
    for backend, settings in found.items():
        shared = {k: v for k, v in settings[0].items() if all(other.get(k) == v for other in settings)}
        if shared:
            items.append((f"{backend} ran with", ", ".join(f"{k} {v}" for k, v in shared.items())))
    return items


def _title(table: Table) -> str:
    bases = dict.fromkeys(line.row.base for line in table.lines)
    return f"{', '.join(bases)} on {table.machine}"


def _subtitle(table: Table) -> str:
    newest = max(line.row.started_at for line in table.lines)
    ran = sum(bool(line.row.measurement) for line in table.lines)
    return f"{ran} of {len(table.lines)} pairs of variant and engine ran; newest row {newest}"


def _e(text: str) -> str:
    """Text as HTML, in elements and in quoted attributes; without characters that do not print."""
    return html.escape("".join(mark if mark.isprintable() else " " for mark in str(text)), quote=True)
