"""Plots as SVG text: scatter with error bars and a Pareto front, bars by part, spreads, percentiles, lines over time.

Every mark carries the number it shows, unrounded, as a `data-` attribute, and the id of its row, so that a page can
filter it and a test can look it up. Text is never scaled: a plot is drawn for a width, and a page holds two of
each. A label is drawn only where its box is free; what has none has a tooltip, and its numbers are in the table.
Rejected: a plotting library (the smallest that draws all of these is larger than the whole page may be) and
drawing in the browser (the same SVG is also the static file), and templates (a plot is arithmetic more than text).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workbench.report.site.svg import (
    FONT,
    Axis,
    Scale,
    cut_text,
    draw_legend,
    escape_text,
    label_text,
    legend_keys,
    marked,
    number_text,
    open_svg,
    shape_of_mark,
    text_element,
    text_width,
    x_ticks,
    y_ticks,
)

MOST_DOTS = 300
"""Points over time that are drawn one by one; more are a line."""


@dataclass(frozen=True)
class Mark:
    """One row of the table in a plot."""

    row: str
    """The id that the table has for it."""
    name: str
    group: int
    """Place of its engine: colour and shape."""
    x: float = 0.0
    y: float = 0.0
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    values: dict[str, float] = field(default_factory=dict)
    """Numbers by name, for plots of several numbers a row."""


@dataclass(frozen=True)
class Curve:
    """One series over time."""

    row: str
    name: str
    group: int
    points: tuple[tuple[float, float, str], ...]
    """Points (days since 1970, value, date)."""
    steps: tuple[tuple[float, float, str], ...] = ()
    """Where a level changed: (days since 1970, value, words)."""


def scatter(
    marks: Sequence[Mark], groups: Sequence[str], x: Axis, y: Axis, title: str, more_is_better: bool, width: int
) -> str:
    """Points with error bars, and the front of those that no other beats in both (`y`: less is better)."""
    top, bottom, right = 30, 58, 14
    height = round(width * (0.62 if width > 400 else 0.86)) + 20
    xs = [v for mark in marks for v in (mark.x, *(mark.x_interval or ()))]
    ys = [v for mark in marks for v in (mark.y, *(mark.y_interval or ()))]
    y_scale = Scale(ys, y, height - bottom, top)
    left = 12 + max(text_width(text) for _, text in y_scale.ticks)
    x_scale = Scale(xs, x, left + 8, width - right - 8)
    out = [open_svg(width, height, title), *draw_legend(groups, left, height - 6)]
    out.append(text_element(4, 12, y.label, "t"))
    out.append(text_element((left + width - right) / 2, height - 26, x.label, "t", "middle"))
    out += y_ticks(y_scale, left, width - right)
    out += x_ticks(x_scale, height - bottom, top, width)
    front = _front(marks, more_is_better)
    if len(front) > 1:
        path = "L".join(f"{x_scale(m.x):.1f} {y_scale(m.y):.1f}" for m in front)
        out.append(f'<path class="f" d="M{path}"/>')
    for mark in marks:
        px, py = x_scale(mark.x), y_scale(mark.y)
        bars = ""
        if mark.x_interval:
            bars += f"M{x_scale(mark.x_interval[0]):.1f} {py:.1f}H{x_scale(mark.x_interval[1]):.1f}"
        if mark.y_interval:
            bars += f"M{px:.1f} {y_scale(mark.y_interval[0]):.1f}V{y_scale(mark.y_interval[1]):.1f}"
        data = f' data-x="{mark.x!r}" data-y="{mark.y!r}"'
        error = f'<path class="e n{mark.group % 5}" d="{bars}"/>' if bars else ""
        words = f"{mark.name}: {x.label} {number_text(mark.x / x.scale)}, {y.label} {number_text(mark.y / y.scale)}"
        out.append(marked(mark.row, words, error + shape_of_mark(mark.group, px, py), data))
    taken = [(x_scale(m.x) - 5, y_scale(m.y) - 5, x_scale(m.x) + 5, y_scale(m.y) + 5) for m in marks]
    inside = (left, top, width - 2, height - bottom - 2)
    for mark in [*front, *(mark for mark in marks if mark not in front)]:
        if placed := label_text(mark.name, x_scale(mark.x), y_scale(mark.y), taken, inside):
            out.append(text_element(*placed, mark.name, "l", row=mark.row))
    return "".join(out) + "</svg>"


def bars(
    marks: Sequence[Mark], groups: Sequence[str], x: Axis, title: str, stacks: Sequence[Sequence[str]], width: int
) -> str:
    """Stacked parts, a row each; each of `stacks` is a bar of its own below the last."""
    parts = [part for stack in stacks for part in stack]
    used = [part for part in parts if any(mark.values.get(part) for mark in marks)]

    def draw(mark: Mark, scale: Scale, y: float) -> str:
        out = ""
        thick = 14 / len(stacks)
        for level, stack in enumerate(stacks):
            start = 0.0
            for part in stack:
                value = mark.values.get(part)
                if not value:
                    continue
                a, b = scale(start), scale(start + value)
                out += (
                    f'<rect class="p{used.index(part) % 6}" x="{a:.1f}" y="{y - 7 + level * thick:.1f}" '
                    f'width="{max(b - a, 0.5):.1f}" height="{thick - 1:.1f}" data-x="{value!r}"/>'
                )
                start += value
        return out

    totals = [sum(mark.values.get(part, 0) for part in stack) for mark in marks for stack in stacks]
    return _rows(
        marks, [0.0, *totals], x, title, width, draw, [(f"p{i % 6}", part) for i, part in enumerate(used)], groups
    )


def spreads(marks: Sequence[Mark], groups: Sequence[str], x: Axis, title: str, width: int) -> str:
    """A box from `p25` to `p75` with the median in it, and whiskers from `p5` to `p95`."""

    def draw(mark: Mark, scale: Scale, y: float) -> str:
        p5, p25, p50, p75, p95 = (scale(mark.values[name]) for name in ("p5", "p25", "p50", "p75", "p95"))
        data = "".join(f' data-{name}="{mark.values[name]!r}"' for name in ("p5", "p25", "p50", "p75", "p95"))
        colour = mark.group % 5
        return (
            f'<path class="e n{colour}" d="M{p5:.1f} {y}H{p95:.1f}M{p5:.1f} {y - 4}v8M{p95:.1f} {y - 4}v8"{data}/>'
            f'<rect class="c{colour}" x="{p25:.1f}" y="{y - 5}" width="{max(p75 - p25, 1):.1f}" height="10"/>'
            f'<path class="h" stroke-width="2" d="M{p50:.1f} {y - 5}v10"/>'
        )

    return _rows(marks, [v for m in marks for v in m.values.values()], x, title, width, draw, [], groups)


def percentiles(marks: Sequence[Mark], groups: Sequence[str], x: Axis, title: str, width: int) -> str:
    """A dot for each named value, on one line a row: darker is nearer the middle of the distribution."""
    names = list(dict.fromkeys(name for mark in marks for name in mark.values))

    def draw(mark: Mark, scale: Scale, y: float) -> str:
        places = [scale(value) for value in mark.values.values()]
        out = f'<path class="e n{mark.group % 5}" d="M{min(places):.1f} {y}H{max(places):.1f}"/>'
        for name, value in mark.values.items():
            rank = names.index(name)
            out += f'<circle class="p{rank % 6}" cx="{scale(value):.1f}" cy="{y}" r="4" data-x="{value!r}"/>'
        return out

    keys = [(f"p{i % 6}", name) for i, name in enumerate(names)]
    return _rows(marks, [v for m in marks for v in m.values.values()], x, title, width, draw, keys, groups)


def over_time(curves: Sequence[Curve], groups: Sequence[str], y: Axis, title: str, width: int) -> str:
    """Values over time, named at their ends where there is room, with a ring where a level changed."""
    top, bottom, right = 30, 50, 150 if width > 400 else 96
    height = round(width * 0.55) + 60
    y_scale = Scale([value for curve in curves for _, value, _ in curve.points], y, height - bottom, top)
    left = 12 + max(text_width(text) for _, text in y_scale.ticks)
    days = [day for curve in curves for day, _, _ in curve.points]
    first, last = min(days), max(days)

    def x_of(day: float) -> float:
        return left + 6 + (day - first) / ((last - first) or 1) * (width - right - left - 12)

    out = [open_svg(width, height, title), *draw_legend(groups, left, height - 6), text_element(4, 12, y.label, "t")]
    out += y_ticks(y_scale, left, width - right)
    dates = sorted({(day, date) for curve in curves for day, _, date in curve.points})
    free = -math.inf
    # The last date is always told; the others where there is room before it.
    end = x_of(dates[-1][0]) - text_width(dates[-1][1]) / 2
    for day, date in dates:
        half = text_width(date) / 2
        if (day, date) == dates[-1] or (x_of(day) - half > free + 6 and x_of(day) + half < end - 6):
            out.append(text_element(max(x_of(day), half + 1), height - bottom + 18, date, "t", "middle"))
            free = max(x_of(day), half + 1) + half
    dots = sum(len(curve.points) for curve in curves) <= MOST_DOTS
    for curve in curves:
        path = "L".join(f"{x_of(day):.1f} {y_scale(value):.1f}" for day, value, _ in curve.points)
        body = f'<path class="n{curve.group % 5}" stroke-width="1.5" d="M{path}"/>' if len(curve.points) > 1 else ""
        if dots or len(curve.points) == 1:
            for day, value, _ in curve.points:
                body += (
                    f'<circle class="c{curve.group % 5}" cx="{x_of(day):.1f}" cy="{y_scale(value):.1f}" r="2" '
                    f'data-y="{value!r}"/>'
                )
        for day, value, what in curve.steps:
            body += (
                f'<circle class="n{curve.group % 5}" stroke-width="2" cx="{x_of(day):.1f}" '
                f'cy="{y_scale(value):.1f}" r="6"><title>{escape_text(what)}</title></circle>'
            )
        out.append(marked(curve.row, curve.name, body))
    taken: list[float] = []
    for curve in sorted(curves, key=lambda one: bool(one.steps), reverse=True):
        py = y_scale(curve.points[-1][1])
        if all(abs(py - other) > FONT + 3 for other in taken):
            taken.append(py)
            out.append(text_element(width - right + 4, py + 4, cut_text(curve.name, right - 8), "l", row=curve.row))
    return "".join(out) + "</svg>"


def _rows(
    marks: Sequence[Mark],
    values: Sequence[float],
    x: Axis,
    title: str,
    width: int,
    draw: Callable[[Mark, Scale, float], str],
    keys: Sequence[tuple[str, str]],
    groups: Sequence[str],
) -> str:
    """One mark a row: its name on the left, on a phone above it."""
    wide = width > 400
    left = 226 if wide else 10
    row_height = 22 if wide else 36
    top, bottom = 8, 44
    legend, lines = legend_keys(keys, width) if keys else ([], 0)
    bottom += 16 * lines
    height = top + row_height * len(marks) + bottom
    scale = Scale(values, x, left + 4, width - 16)
    out = [open_svg(width, height, title)]
    out += x_ticks(scale, height - bottom, top, width)
    out.append(text_element((left + width) / 2, height - bottom + 34, x.label, "t", "middle"))
    out += [item.replace("@", f"{height - bottom + 52 + 16 * line:.0f}") for item, line in legend]
    for place, mark in enumerate(marks):
        base = top + row_height * place
        y = base + (11 if wide else 26)
        name = cut_text(mark.name, (left if wide else width) - 12)
        text = text_element(left - 8, y + 4, name, "l", "end") if wide else text_element(left, base + 12, name, "l")
        out.append(marked(mark.row, mark.name, text + draw(mark, scale, y)))
    return "".join(out) + "</svg>"


def _front(marks: Sequence[Mark], more_is_better: bool) -> list[Mark]:
    """The marks that none beats in both, from the best `x` on."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (-m.x if more_is_better else m.x, m.y)):
        if not found or mark.y < found[-1].y:
            found.append(mark)
    return found
