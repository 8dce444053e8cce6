"""One HTML page that needs nothing else: the table, the plots, and where the numbers come from.

No network, no library: style, script and plots are in the page, and its content policy forbids the rest. The table
sorts and filters; what is filtered out leaves the plots too. Everything that came out of a recipe, an engine or a
file is escaped. Numbers carry the stored value in full (`data-v`), so that what is seen can be checked.
Rejected: a charting library (plotly alone is larger than the whole page may be) and a framework.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from workbench.records import Row
from workbench.report import charts, compare, statistics
from workbench.report.charts import NARROW, WIDE, Axis, Mark
from workbench.report.history import Series, Step
from workbench.report.metrics import METRICS
from workbench.report.table import BASE, Line, Table, workload

MIB = 2.0**20
HOST_PARTS = ("peak_rss_anon", "peak_rss_file", "peak_rss_shared")
NOT_PARTS = ("peak_rss", "peak_vram", *HOST_PARTS)
HISTORY = ("decode_tok_s", "prefill_tok_s", "perplexity", "kld_mean", "peak_rss_bytes", "peak_vram_bytes")
MOST_LINES = 40
"""Series in one plot over time."""


@dataclass(frozen=True)
class Plot:
    """A plot in two widths."""

    name: str
    title: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True)
class Column:
    """A column of numbers: what it shows, and its error beside it."""

    heading: str
    unit: str
    value: Callable[[Line], float | None]
    show: Callable[[float], str]
    error: Callable[[Line], str] = lambda line: ""
    help: str = ""


def page(
    table: Table, series: Sequence[Series] = (), steps: Sequence[Step] = (), *, title: str = "",
    back: str | None = None,
) -> str:  # fmt: skip
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


def plots(table: Table, series: Sequence[Series] = (), steps: Sequence[Step] = ()) -> list[Plot]:
    """Every plot that the rows have the numbers for."""
    ids = row_ids(table)
    groups = groups_of(table)
    found: list[Plot] = []

    def marks(values: Callable[[Line], dict[str, float] | None]) -> list[Mark]:
        made = []
        for line in table.lines:
            found = values(line)
            if found:
                made.append(_mark(line, ids, groups, table, values=found))
        return made

    def add(name: str, title: str, caption: str, draw: Callable[[int], str]) -> None:
        found.append(Plot(name, title, caption, draw(WIDE), draw(NARROW)))

    quality = Axis("perplexity", log=True)
    size = _scatter_marks(table, ids, groups, "disk_bytes", None)
    if len(size) > 1:
        add(
            "quality-size", "Quality against size",
            "Lower and further left is better; the dashed line joins what nothing beats in both. Bars: 95 %.",
            lambda width: charts.scatter(
                size, groups, Axis("size, MiB", MIB, log=True), quality, "Perplexity against size", width, False
            ),
        )  # fmt: skip
    speed = _scatter_marks(table, ids, groups, "decode_tok_s", lambda line: line.decode_interval)
    if len(speed) > 1:
        add(
            "quality-speed", "Quality against speed",
            "Lower and further right is better; the dashed line joins what nothing beats in both. Bars: 95 %.",
            lambda width: charts.scatter(
                speed, groups, Axis("decode, tok/s", log=True), quality, "Perplexity against speed", width, True
            ),
        )  # fmt: skip
    memory = marks(memory_parts)
    if memory:
        own = list(dict.fromkeys(part for mark in memory for part in mark.values if part not in HOST_PARTS))
        stacks = [stack for stack in (own, list(HOST_PARTS)) if any(part in m.values for m in memory for part in stack)]
        add(
            "memory", "Memory by part",
            "Upper bar: what the engine says of its own; lower bar: the host memory of its processes at their peak.",
            lambda width: charts.bars(memory, groups, Axis("MiB", MIB), "Memory by part", width, stacks),
        )  # fmt: skip
    latency = marks(latencies)
    if latency:
        add(
            "latency", "Time between tokens",
            "Box: the middle half, with the median; whiskers: 5 % to 95 % of all decoding steps of all repeats.",
            lambda width: charts.spreads(latency, groups, Axis("ms", 1e-3, log=True), "Time between tokens", width),
        )  # fmt: skip
    divergence = marks(divergences)
    if divergence:
        add(
            "divergence", "Divergence from the base",
            "Percentiles over the scored tokens of the KL divergence from the base's distribution.",
            lambda width: charts.percentiles(
                divergence, groups, Axis("nats a token", log=True), "Divergence from the base, percentiles", width
            ),
        )  # fmt: skip
    for metric in HISTORY:
        lines = _history(metric, series, steps, ids, groups, table)
        if lines:
            axis = _axis(metric)
            add(
                f"history-{metric}", _sentence(f"{METRICS[metric].title} over time"),
                "A line a variant and engine; a ring marks where a level changed.",
                partial(charts.lines, lines, groups, axis, f"{axis.label} over time"),
            )  # fmt: skip
    return found


def row_ids(table: Table) -> dict[str, str]:
    """Row key -> the id that table and plots have for it."""
    return {line.row.key: f"r{place}" for place, line in enumerate(table.lines)}


def groups_of(table: Table) -> list[str]:
    """The engines, in order; their place is their colour and shape."""
    return list(dict.fromkeys(line.row.backend for line in table.lines))


def memory_parts(line: Line) -> dict[str, float] | None:
    """Bytes: what the engine says of its own parts, and the host's of its processes."""
    memory = line.row.measurement.memory if line.row.measurement else {}
    own = {k: float(v) for k, v in memory.items() if k not in NOT_PARTS and _is_count(v) and not k.startswith("peak")}
    host = {part: float(memory[part]) for part in HOST_PARTS if _is_count(memory.get(part))}
    return own | host or None


def latencies(line: Line) -> dict[str, float] | None:
    """Percentiles of the seconds of all decoding steps at the first workload point; None for fewer than five."""
    speeds = line.row.measurement.speeds if line.row.measurement else []
    steps = sorted(step for repeat in (speeds[0].step_s if speeds else []) for step in repeat if _is_count(step))
    if len(steps) < 5:
        return None
    return {f"p{p}": statistics.quantile(steps, p / 100) for p in (5, 25, 50, 75, 95)}


def divergences(line: Line) -> dict[str, float] | None:
    """Percentiles of the divergence, in nats a token."""
    if line.row.artifact.method == BASE:
        return None
    names = {"median": "kld_p50", "90 %": "kld_p90", "99 %": "kld_p99", "99.9 %": "kld_p999", "maximum": "kld_max"}
    return {shown: value for shown, name in names.items() if (value := line.values[name])} or None


def days_of(at: str) -> float:
    """Days since 1970 of a row's time; 0 if it cannot be read."""
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() / 86400


def columns(table: Table) -> list[Column]:
    """The columns of numbers that any line has."""

    def number(
        name: str, heading: str, unit: str, scale: float, spec: str, error: Any = None, help: str = ""
    ) -> Column:
        return Column(
            heading, unit, lambda line: line.values[name], lambda value: format(value / scale, spec),
            error or (lambda line: ""), help,
        )  # fmt: skip

    def se(name: str, spec: str, scale: float = 1.0) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            error = line.errors.get(name)
            return f"±{error / scale:{spec}}" if error is not None else ""

        return text

    def interval(which: str) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            found = line.prefill_interval if which == "prefill_tok_s" else line.decode_interval
            return f"{found[0]:.1f}–{found[1]:.1f}" if found else ""

        return text

    prompt, new, batch = (
        workload(table.lines[0].row) if len({workload(line.row) for line in table.lines}) == 1 else (0, 0, 0)
    )
    point = f"{prompt} prompt tokens, {new} new ones, batch {batch}" if prompt else "see the workload"
    found = [
        number("bits_per_weight", "bpw", "bit", 1, ".2f", help="Bytes of all weight tensors x 8 over parameters"),
        number("disk_bytes", "size", "MiB", MIB, ".1f"),
        number("load_s", "load", "s", 1, ".1f"),
        number("peak_rss_bytes", "peak RSS", "MiB", MIB, ".0f", help="Of all processes of the engine, on the host"),
        number("peak_vram_bytes", "peak VRAM", "MiB", MIB, ".0f"),
        number("prefill_tok_s", "prefill", "tok/s", 1, ".1f", interval("prefill_tok_s"), f"Median of {point}; 95 %"),
        number("decode_tok_s", "decode", "tok/s", 1, ".1f", interval("decode_tok_s"), f"Median of {point}; 95 %"),
        number("ttft_s", "first token", "ms", 1e-3, ".1f", help="From submitting the prompt, median of the repeats"),
        number("itl_p95_s", "between tokens, 95 %", "ms", 1e-3, ".1f", help="95 % of the decoding steps are faster"),
        number("energy_j_per_token", "energy", "J/token", 1, ".3f", help="Of the whole machine"),
        number("bandwidth_fraction", "bandwidth", "%", 0.01, ".0f", help="Weights read, of what the machine can copy"),
        number("perplexity", "perplexity", "", 1, ".3f", se("perplexity", ".3f"), "± one standard error, by windows"),
        Column(
            "Δ perplexity", "", lambda line: line.delta.value if line.delta else None,
            lambda value: f"{value:+.3f}",
            lambda line: (
                ("~ " if line.below_noise_floor and line.row.artifact.method != BASE else "")
                + (f"±{line.delta.se:.3f}" if line.delta and line.delta.se else "")
            ).strip(),
            "To the base on the same engine, paired; ~ is below the noise floor",
        ),
        number("kld_mean", "KLD", "nat", 1, ".4f", se("kld_mean", ".4f"), "Mean divergence from the base, a token"),
        number("kld_p99", "KLD 99 %", "nat", 1, ".3f"),
        number("top1_agreement", "same top", "%", 0.01, ".2f", se("top1_agreement", ".2f", 0.01)),
    ]  # fmt: skip
    found += [_further(name, table) for name in table.further]
    found += [_task(name) for name in dict.fromkeys(name for line in table.lines for name in line.tasks)]
    return [column for column in found if any(column.value(line) is not None for line in table.lines)]


def _further(name: str, table: Table) -> Column:
    """The perplexity on another evaluation set of the recipe."""
    lines = {line.row.key: line for line in table.further[name].lines}

    def error(line: Line) -> str:
        se = lines[line.row.key].errors.get("perplexity")
        return f"±{se:.3f}" if se is not None else ""

    return Column(
        f"perplexity, {name}", "", lambda line: lines[line.row.key].values["perplexity"],
        lambda value: f"{value:.3f}", error, "± one standard error, by windows",
    )  # fmt: skip


def _task(name: str) -> Column:
    def error(line: Line) -> str:
        se = line.tasks[name].accuracy.se
        return f"±{100 * se:.1f}" if se is not None else ""

    return Column(
        name, "%", lambda line: line.tasks[name].accuracy.value if name in line.tasks else None,
        lambda value: f"{100 * value:.1f}", error, "Share of items answered rightly; ± one standard error",
    )  # fmt: skip


def _mark(line: Line, ids: dict[str, str], groups: Sequence[str], table: Table, **more: Any) -> Mark:
    name = " · ".join([line.row.artifact.variant, *_details(table, line)])
    if len(groups) > 1:
        name += f" · {line.row.backend}"
    return Mark(ids[line.row.key], name, groups.index(line.row.backend), **more)


def _details(table: Table, line: Line) -> list[str]:
    """What else tells a line from another of its variant and engine."""
    return [text for column in table.varying if (text := column.text(line.row))]


def _scatter_marks(
    table: Table, ids: dict[str, str], groups: Sequence[str], name: str,
    interval: Callable[[Line], tuple[float, float] | None] | None,
) -> list[Mark]:  # fmt: skip
    found = []
    for line in table.lines:
        x, y = line.values[name], line.values["perplexity"]
        if x is None or y is None:
            continue
        error = line.errors["perplexity"]
        windows = (
            len(line.row.measurement.quality["windows"]) if line.row.measurement and line.row.measurement.quality else 0
        )
        spread = statistics.interval(statistics.Estimate(y, error, windows)) if error and windows > 1 else None
        if spread and spread[0] <= 0:
            spread = None
        mark = _mark(
            line, ids, groups, table, x=x, y=y, x_interval=interval(line) if interval else None, y_interval=spread
        )
        # Engine names stay in the legend and the tooltip: labels are for variants.
        found.append(replace(mark, name=" · ".join([line.row.artifact.variant, *_details(table, line)])))
    return found


def _axis(metric: str) -> Axis:
    known = METRICS[metric]
    if known.unit == "B":
        return Axis(f"{known.title}, MiB", MIB, log=True)
    return Axis(f"{known.title}{', ' if known.unit else ''}{known.unit}", log=True)


def _history(
    metric: str, series: Sequence[Series], steps: Sequence[Step], ids: dict[str, str], groups: Sequence[str],
    table: Table,
) -> list[charts.Line]:  # fmt: skip
    latest = {compare.pair_of(line.row): ids[line.row.key] for line in table.lines}
    found = []
    for one in series:
        points = one.values(metric)
        if len(points) < 2 or one.pair.backend not in groups:
            continue
        own = [step for step in steps if step.metric == metric and step.series is one]
        found.append(
            charts.Line(
                row=latest.get(one.pair, ""), name=one.label.replace(" on ", " ", 1),
                group=groups.index(one.pair.backend),
                points=tuple((days_of(p.at), value, p.at[:10]) for p, value in points),
                steps=tuple((days_of(s.first.at), s.after, f"{s.relative:+.1%} since {s.first.at[:10]}") for s in own),
            )
        )  # fmt: skip
    found.sort(key=lambda line: not line.steps)
    return found[:MOST_LINES]


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
            f"<span data-v='{step.before!r}'>{_e(compare.amount(step.before, unit))}</span> → "
            f"<span data-v='{step.after!r}'>{_e(compare.amount(step.after, unit))}</span> "
            f"({100 * step.relative:+.1f} %) since "
            f"<time datetime='{_e(step.first.at)}'>{_e(step.first.at[:10])}</time>; "
            f"{'changed with it: ' + _e(changed) if changed else 'no version changed with it'}"
            f"{'' if step.open else ' <em>(mended since)</em>'}</li>"
        )
    return f"<ul class=steps>{''.join(items)}</ul>"


def _floor_section(table: Table) -> str:
    items = []
    for floor in table.noise_floors:
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
    if machine.get("cpu"):
        memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB" if _is_count(machine.get("memory_bytes")) else ""
        items.append(("processor", f"{machine['cpu']}, {machine.get('threads', '?')} threads{memory}"))
    for gpu in machine.get("gpus") or []:
        items.append(("GPU", f"{gpu.get('name')}, driver {machine.get('driver')}"))
    if machine.get("system"):
        items.append(("system", f"{machine['system']}, Python {machine.get('python', '?')}"))
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
    if table.evaluation:
        e = table.evaluation
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


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _e(text: str) -> str:
    """Text as HTML, in elements and in quoted attributes; without characters that do not print."""
    return html.escape("".join(mark if mark.isprintable() else " " for mark in str(text)), quote=True)


CSS = (
    f":root{{color-scheme:light dark;{charts.STYLE}}}@media(prefers-color-scheme:dark){{:root{{{charts.STYLE_DARK}}}}}"
    "*{box-sizing:border-box}body{margin:0 auto;max-width:1240px;padding:16px;background:var(--paper);color:var(--ink);"
    "font:15px/1.5 system-ui,'DejaVu Sans',sans-serif}h1{font-size:1.5rem;margin:.2em 0;overflow-wrap:anywhere}"
    "h2{font-size:1.15rem;margin:1.6em 0 .5em}.soft,figcaption,.notes,dl{color:var(--soft)}a{color:var(--c0)}"
    ".filters{display:flex;flex-wrap:wrap;gap:8px 20px;align-items:center;margin:0 0 10px}fieldset{border:0;padding:0;"
    "margin:0;display:flex;flex-wrap:wrap;gap:4px 14px}legend{float:left;padding:0;margin-right:10px}"
    "input[type=search]{font:inherit;padding:4px 8px;border:1px solid var(--soft);border-radius:4px;"
    "background:var(--paper);color:var(--ink);max-width:100%}"
    ".scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:6px}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}"
    "th,td{padding:5px 10px;text-align:left;white-space:nowrap;border-bottom:1px solid var(--rule)}.n{text-align:right}"
    "thead th{border-bottom:2px solid var(--soft)}tbody tr:last-child>*{border-bottom:0}"
    "tbody th{position:sticky;left:0;background:var(--paper);font-weight:inherit}.base{font-weight:600}"
    ".no{color:var(--soft)}.bad{color:var(--c1)}small{color:var(--soft);font-weight:400}"
    "th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible,.scroll:focus-visible,a:focus-visible,"
    "input:focus-visible{outline:2px solid var(--c0);outline-offset:2px}"
    "th[aria-sort=ascending] button::after{content:' ▲'}th[aria-sort=descending] button::after{content:' ▼'}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,560px),1fr));gap:24px;align-items:start}"
    "figure{margin:0;min-width:0}figcaption{font-size:13px;margin-bottom:4px}svg{display:block;max-width:none}"
    ".wide,.narrow{overflow-x:auto}.narrow{display:none}@media(max-width:620px){.wide{display:none}.narrow{display:block}}"
    "svg [data-r].off{display:none}tr.off{display:none}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 16px;font-size:14px}"
    "dd{margin:0;overflow-wrap:anywhere}@media(max-width:620px){dl{grid-template-columns:1fr}"
    "dt{font-weight:600}}.notes,.steps{font-size:14px;overflow-wrap:anywhere}.steps li{margin:4px 0}" + charts.RULES
)

SCRIPT = """
"use strict";
const table = document.getElementById("rows"), body = table.tBodies[0];
const rows = [...body.rows], start = new Map(rows.map((row, i) => [row, i]));
const find = document.getElementById("find"), ran = document.getElementById("measured");
const engines = [...document.querySelectorAll("input.engine")], count = document.getElementById("count");
const marks = new Map();
for (const mark of document.querySelectorAll("svg [data-r]"))
  marks.set(mark.dataset.r, [...(marks.get(mark.dataset.r) || []), mark]);
function filter() {
  const words = find.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const on = new Set(engines.filter(box => box.checked).map(box => box.value));
  let seen = 0;
  for (const row of rows) {
    const shown = on.has(row.dataset.g) && (!ran.checked || row.dataset.m === "1") &&
      words.every(word => row.dataset.s.includes(word));
    row.classList.toggle("off", !shown);
    for (const mark of marks.get(row.dataset.r) || []) mark.classList.toggle("off", !shown);
    seen += shown;
  }
  count.textContent = seen + " of " + rows.length + " rows";
}
function sort(head, place) {
  const old = head.getAttribute("aria-sort");
  const next = old === "none" ? "ascending" : old === "ascending" ? "descending" : "none";
  for (const other of table.tHead.rows[0].cells)
    if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", next);
  const way = next === "descending" ? -1 : 1, number = head.classList.contains("n");
  const value = row => number ? parseFloat(row.cells[place].dataset.v) : row.cells[place].textContent;
  const order = (a, b) => {
    if (next === "none") return start.get(a) - start.get(b);
    const x = value(a), y = value(b);
    if (number) return isNaN(x) - isNaN(y) || (isNaN(x) ? 0 : way * (x - y)) || start.get(a) - start.get(b);
    return way * x.localeCompare(y, "en", {numeric: true}) || start.get(a) - start.get(b);
  };
  body.append(...[...rows].sort(order));
}
[...table.tHead.rows[0].cells].forEach((head, place) => {
  const button = head.querySelector("button");
  if (button) button.addEventListener("click", () => sort(head, place));
});
for (const input of [find, ran, ...engines]) input.addEventListener("input", filter);
filter();
"""
