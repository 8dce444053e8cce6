"""Plots as SVG text: scatter with error bars and a Pareto front, bars by part, spreads, percentiles, lines over time.

Every mark carries the number it shows, unrounded, as a `data-` attribute, and the id of its row, so that a page can
filter it and a test can look it up. Text is never scaled: a plot is drawn for a width, and a page holds two of
each. A label is drawn where its box is free, with a line to its point if that is further off.
Rejected: a plotting library (the smallest that draws all of these is larger than the whole page may be) and
drawing in the browser (the same SVG is also the static file), and templates (a plot is arithmetic more than text).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from workbench.report.site.svg import (
    FONT,
    Axis,
    Scale,
    cut_text,
    draw_legend,
    escape_text,
    legend_keys,
    linked,
    marked,
    number_text,
    open_svg,
    place_label,
    shape_of_mark,
    text_element,
    text_width,
    x_ticks,
    y_ticks,
)
from workbench.sizes import mib_text

MOST_NAMES = 60
"""Points of a scatter plot that are named in full; of more, numbers stand for the names."""
MOST_NUMBERS = 300
"""Points that are named at all: of more nobody would read them."""
NEAR = 26
"""Pixels between two points of one variant that share its name."""
KEY_LINE = 16
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
    area: float = 0.0
    """Bytes that the point's area shows."""
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
    """Points with error bars, each named and a link to its row, and the front of those that none beats in both.

    Less of `y` is better. Where marks have an `area`, points show it. On a phone, and for very many, names are numbers
    with a key below."""
    wide = width > 400 and len(marks) <= MOST_NAMES
    names = list(dict.fromkeys(mark.name for mark in marks)) if len(marks) <= MOST_NUMBERS else []
    key = [] if wide or not names else _key(names, width)
    top, bottom, right = 30, 62 + (32 if any(mark.area for mark in marks) else 0), 14
    plot = round(min(width * 0.62, 380 + 5 * len(marks))) if width > 400 else 300
    height = top + plot + bottom + KEY_LINE * len(key)
    floor = top + plot
    xs = [v for mark in marks for v in (mark.x, *(mark.x_interval or ()))]
    ys = [v for mark in marks for v in (mark.y, *(mark.y_interval or ()))]
    y_scale = Scale(ys, y, floor - 16, top + 8)
    left = 12 + max(text_width(text) for _, text in y_scale.ticks)
    x_scale = Scale(xs, x, left + 16, width - right - 16)
    most = max(mark.area for mark in marks)
    out = [open_svg(width, height, title, "group"), *draw_legend(groups, left, floor + 56)]
    out.append(text_element(4, 14, y.label, "t"))
    out.append(text_element((left + width - right) / 2, floor + 34, x.label, "t", "middle"))
    out += y_ticks(y_scale, left, width - right)
    out += x_ticks(x_scale, floor, top, width)
    if most:
        out += _area_legend([mark.area for mark in marks], left, floor + 78)
    front = _front(marks, more_is_better)
    if len(front) > 1:
        path = "L".join(f"{x_scale(m.x):.1f} {y_scale(m.y):.1f}" for m in front)
        out.append(f'<path class="f" d="M{path}"/>')
    places = [(mark, x_scale(mark.x), y_scale(mark.y), _radius(mark.area, most)) for mark in marks]
    for mark, px, py, radius in sorted(places, key=itemgetter(3), reverse=True):
        lines = ""
        if mark.x_interval:
            lines += f"M{x_scale(mark.x_interval[0]):.1f} {py:.1f}H{x_scale(mark.x_interval[1]):.1f}"
        if mark.y_interval:
            lines += f"M{px:.1f} {y_scale(mark.y_interval[0]):.1f}V{y_scale(mark.y_interval[1]):.1f}"
        data = f' data-x="{mark.x!r}" data-y="{mark.y!r}"' + (f' data-v="{mark.area!r}"' if mark.area else "")
        error = f'<path class="e n{mark.group % 5}" d="{lines}"/>' if lines else ""
        words = f"{mark.name} on {groups[mark.group]}: {x.label} {number_text(mark.x / x.scale)}, {y.label} "
        words += number_text(mark.y / y.scale) + (f", {mib_text(mark.area)}" if mark.area else "")
        out.append(linked(mark.row, words, error + shape_of_mark(mark.group, px, py, radius), data))
    taken = [(px - r - 1, py - r - 1, px + r + 1, py + r + 1) for _, px, py, r in places]
    inside = (left, top, width - 2, floor - 2)
    leaders, labels = [], []
    named: list[tuple[str, float, float]] = []
    for mark, px, py, radius in sorted(places, key=lambda place: place[0] not in front) if names else []:
        # One name will do for the points of a variant that lie on each other.
        if any(name == mark.name and math.hypot(px - a, py - b) < NEAR for name, a, b in named):
            continue
        words = mark.name if wide else str(names.index(mark.name) + 1)
        if label := place_label(words, px, py, radius, taken, inside):
            named.append((mark.name, px, py))
            rows = [m.row for m, a, b, _ in places if m.name == mark.name and math.hypot(px - a, py - b) < NEAR]
            labels.append(text_element(label.left, label.baseline, words, "l", row=" ".join(rows)))
            if label.leader:
                a, b, c, d = label.leader
                leaders.append(f'<path class="k" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" data-r="{" ".join(rows)}"/>')
    for place, line in enumerate(key):
        for part, words in enumerate(line):
            at = 10 + part * (width - 10) / len(line)
            out.append(text_element(at, floor + bottom + KEY_LINE * (place + 1) - 4, words, "t"))
    return "".join([*out, *leaders, *labels]) + "</svg>"


def _radius(area: float, most: float) -> float:
    """Of a point that shows a size: areas are in proportion, up to 14 pixels; none is too small to be hit."""
    return max(3.5, 14 * math.sqrt(area / most)) if most else 4.0


def _area_legend(areas: Sequence[float], left: float, y: float) -> list[str]:
    """The smallest and the largest size as points."""
    out, x = [text_element(left - 4, y, "size:", "t")], left + 42
    for area in dict.fromkeys((min(areas), max(areas))):
        radius = _radius(area, max(areas))
        out.append(f'<circle class="k" cx="{x:.1f}" cy="{y - 4:.1f}" r="{radius:.1f}"/>')
        out.append(text_element(x + radius + 6, y, mib_text(area), "t"))
        x += 48 + text_width(mib_text(area))
    return out


def _key(names: Sequence[str], width: int) -> list[list[str]]:
    """Lines of numbered names, as many beside each other as there is room for."""
    told = [f"{place} {name}" for place, name in enumerate(names, start=1)]
    many = max(1, math.floor((width - 10) / (max(map(text_width, told)) + 8)))
    rows = -(-len(told) // many)
    return [[cut_text(words, width / many - 8) for words in told[line::rows]] for line in range(rows)]


def bars(
    marks: Sequence[Mark], groups: Sequence[str], x: Axis, title: str, stacks: Sequence[Sequence[str]], width: int
) -> str:
    """Stacked parts, a row each; each of `stacks` is a bar of its own below the last. One of a single part is grey."""
    used = [part for stack in stacks for part in stack if any(mark.values.get(part) for mark in marks)]
    single = [stack[0] for stack in stacks if len(stack) == 1]
    stacked = [part for part in used if part not in single]
    colours = {part: stacked.index(part) % 6 if part in stacked else 6 + single.index(part) % 2 for part in used}

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
                    f'<rect class="p{colours[part]}" x="{a:.1f}" y="{y - 7 + level * thick:.1f}" '
                    f'width="{max(b - a, 0.5):.1f}" height="{thick - 1:.1f}" data-x="{value!r}"/>'
                )
                start += value
        return out

    totals = [sum(mark.values.get(part, 0) for part in stack) for mark in marks for stack in stacks]
    keys = [(f"p{colour}", part) for part, colour in colours.items()]
    return _rows(marks, [0.0, *totals], x, title, width, draw, keys, groups)


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


def over_time(
    curves: Sequence[Curve], groups: Sequence[str], y: Axis, title: str, versions: Sequence[float], width: int
) -> str:
    """Values over time, named at their ends where there is room, with a ring where a level changed.

    At each of the days of `versions` there is a line across all, numbered from 1."""
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
    free = -math.inf
    for number, day in enumerate(versions, start=1):
        if first <= day <= last and (px := x_of(day)) > free:
            out.append(f'<path class="k" d="M{px:.1f} {top}V{height - bottom}"/>')
            out.append(text_element(px, top - 3, str(number), "t", "middle"))
            free = px + text_width(str(number)) + 2
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
    left = min(330, 16 + max(text_width(mark.name) for mark in marks)) if wide else 10
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
