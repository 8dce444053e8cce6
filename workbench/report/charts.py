"""Plots as SVG text: scatter with error bars and a Pareto front, bars by part, spreads, percentiles, lines over time.

Every mark carries the number it shows, unrounded, as a `data-` attribute, and the id of its row, so that a page can
filter it and a test can look it up. Text is never scaled: a plot is drawn for a width, and a page holds two of
each. A label is drawn only where its box is free; what has none has a tooltip, and its numbers are in the table.
Rejected: a plotting library (the smallest that draws all of these is larger than the whole page may be) and
drawing in the browser (the same SVG is also the static file).
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

FONT = 11
"""Pixels, of every text in a plot."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
"""By engine, beside the colour: not everybody sees colours, and not every printer has them."""
WIDE, NARROW = 560, 340
"""Pixels: a column of a desktop's page, and a phone's."""

MOST_DOTS = 300
"""Points over time that are drawn one by one; more are a line."""

STYLE = (
    "--ink:#1c2430;--soft:#5c6675;--rule:#d7dce3;--paper:#fff;"
    "--c0:#1f6feb;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#a16207;"
    "--p0:#1f6feb;--p1:#7aa7e9;--p2:#c2410c;--p3:#e0a07d;--p4:#15803d;--p5:#8a94a3"
)
STYLE_DARK = (
    "--ink:#e6eaf0;--soft:#9aa5b4;--rule:#343c48;--paper:#12161c;"
    "--c0:#6ea8fe;--c1:#fb923c;--c2:#4ade80;--c3:#c084fc;--c4:#facc15;"
    "--p0:#6ea8fe;--p1:#3d6198;--p2:#fb923c;--p3:#95562a;--p4:#4ade80;--p5:#7b8595"
)
RULES = (
    f"svg text{{font-size:{FONT}px;font-family:system-ui,'DejaVu Sans',sans-serif;fill:var(--ink)}}"
    "svg .t{fill:var(--soft)}"
    "svg .g{stroke:var(--rule);stroke-width:1;fill:none}svg .e{stroke-width:1.2;fill:none;opacity:.55}"
    "svg .f{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3;fill:none}svg .h{stroke:var(--paper)}"
    + "".join(f"svg .c{i}{{fill:var(--c{i});stroke:var(--c{i})}}" for i in range(5))
    + "".join(f"svg .n{i}{{fill:none;stroke:var(--c{i})}}" for i in range(5))
    + "".join(f"svg .p{i}{{fill:var(--p{i})}}" for i in range(6))
)


@dataclass(frozen=True)
class Axis:
    """How numbers of one kind are shown."""

    label: str
    scale: float = 1.0
    """What a stored number is divided by."""
    log: bool = False
    """Asked for; granted where the values span more than a factor of four."""


@dataclass(frozen=True)
class Mark:
    """One row of the table in a plot."""

    row: str
    """The id that the table has for it."""
    name: str
    group: int
    """Of its engine: colour and shape."""
    x: float = 0.0
    y: float = 0.0
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    values: dict[str, float] = field(default_factory=dict)
    """For plots of several numbers a row, by name."""


@dataclass(frozen=True)
class Line:
    """One series over time."""

    row: str
    name: str
    group: int
    points: tuple[tuple[float, float, str], ...]
    """(days, value, date)"""
    steps: tuple[tuple[float, float, str], ...] = ()
    """(days, value, what it is)"""


def scatter(
    marks: Sequence[Mark], groups: Sequence[str], x: Axis, y: Axis, title: str, width: int, more_is_better: bool
) -> str:
    """Points with error bars, and the front of those that no other beats in both (`y`: less is better)."""
    top, bottom, right = 30, 58, 14
    height = round(width * (0.62 if width > 400 else 0.86)) + 20
    xs = [v for mark in marks for v in (mark.x, *(mark.x_interval or ()))]
    ys = [v for mark in marks for v in (mark.y, *(mark.y_interval or ()))]
    y_scale = _Scale(ys, y, height - bottom, top)
    left = 12 + max(_width(text) for _, text in y_scale.ticks)
    x_scale = _Scale(xs, x, left + 8, width - right - 8)
    out = [_open(width, height, title), *_legend(groups, left, height - 6)]
    out.append(_text(4, 12, y.label, "t"))
    out.append(_text((left + width - right) / 2, height - 26, x.label, "t", "middle"))
    for place, text in y_scale.ticks:
        out.append(f'<path class="g" d="M{left} {place:.1f}H{width - right}"/>')
        out.append(_text(left - 6, place + 4, text, "t", "end"))
    out += _x_ticks(x_scale, height - bottom, top, width)
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
        words = f"{mark.name}: {x.label} {_number(mark.x / x.scale)}, {y.label} {_number(mark.y / y.scale)}"
        out.append(_marked(mark.row, words, error + _shape(mark.group, px, py), data))
    taken = [(x_scale(m.x) - 5, y_scale(m.y) - 5, x_scale(m.x) + 5, y_scale(m.y) + 5) for m in marks]
    order = [*front, *(mark for mark in marks if mark not in front)]
    for mark in order:
        placed = _label(mark.name, x_scale(mark.x), y_scale(mark.y), taken, (left, top, width - 2, height - bottom - 2))
        if placed:
            out.append(_text(*placed, mark.name, "l", row=mark.row))
    return "".join(out) + "</svg>"


def bars(
    marks: Sequence[Mark], groups: Sequence[str], x: Axis, title: str, width: int, stacks: Sequence[Sequence[str]]
) -> str:
    """Stacked parts, a row each; each of `stacks` is a bar of its own below the last."""
    parts = [part for stack in stacks for part in stack]
    used = [part for part in parts if any(mark.values.get(part) for mark in marks)]

    def draw(mark: Mark, scale: _Scale, y: float) -> str:
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

    def draw(mark: Mark, scale: _Scale, y: float) -> str:
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

    def draw(mark: Mark, scale: _Scale, y: float) -> str:
        places = [scale(value) for value in mark.values.values()]
        out = f'<path class="e n{mark.group % 5}" d="M{min(places):.1f} {y}H{max(places):.1f}"/>'
        for name, value in mark.values.items():
            rank = names.index(name)
            out += f'<circle class="p{rank % 6}" cx="{scale(value):.1f}" cy="{y}" r="4" data-x="{value!r}"/>'
        return out

    keys = [(f"p{i % 6}", name) for i, name in enumerate(names)]
    return _rows(marks, [v for m in marks for v in m.values.values()], x, title, width, draw, keys, groups)


def lines(series: Sequence[Line], groups: Sequence[str], y: Axis, title: str, width: int) -> str:
    """Values over time, named at their ends where there is room, with a ring where a level changed."""
    top, bottom, right = 30, 50, 150 if width > 400 else 96
    height = round(width * 0.55) + 60
    y_scale = _Scale([value for line in series for _, value, _ in line.points], y, height - bottom, top)
    left = 12 + max(_width(text) for _, text in y_scale.ticks)
    days = [day for line in series for day, _, _ in line.points]
    first, last = min(days), max(days)

    def x_of(day: float) -> float:
        return left + 6 + (day - first) / ((last - first) or 1) * (width - right - left - 12)

    out = [_open(width, height, title), *_legend(groups, left, height - 6), _text(4, 12, y.label, "t")]
    for place, text in y_scale.ticks:
        out.append(f'<path class="g" d="M{left} {place:.1f}H{width - right}"/>')
        out.append(_text(left - 6, place + 4, text, "t", "end"))
    dates = sorted({(day, date) for line in series for day, _, date in line.points})
    free = -math.inf
    # The last date is always told; the others where there is room before it.
    end = x_of(dates[-1][0]) - _width(dates[-1][1]) / 2
    for day, date in dates:
        half = _width(date) / 2
        if (day, date) == dates[-1] or (x_of(day) - half > free + 6 and x_of(day) + half < end - 6):
            out.append(_text(max(x_of(day), half + 1), height - bottom + 18, date, "t", "middle"))
            free = max(x_of(day), half + 1) + half
    dots = sum(len(line.points) for line in series) <= MOST_DOTS
    for line in series:
        path = "L".join(f"{x_of(day):.1f} {y_scale(value):.1f}" for day, value, _ in line.points)
        body = f'<path class="n{line.group % 5}" stroke-width="1.5" d="M{path}"/>' if len(line.points) > 1 else ""
        if dots or len(line.points) == 1:
            for day, value, _ in line.points:
                body += (
                    f'<circle class="c{line.group % 5}" cx="{x_of(day):.1f}" cy="{y_scale(value):.1f}" r="2" '
                    f'data-y="{value!r}"/>'
                )
        for day, value, what in line.steps:
            body += (
                f'<circle class="n{line.group % 5}" stroke-width="2" cx="{x_of(day):.1f}" '
                f'cy="{y_scale(value):.1f}" r="6"><title>{_escape(what)}</title></circle>'
            )
        out.append(_marked(line.row, line.name, body))
    taken: list[tuple[float, float]] = []
    for line in sorted(series, key=lambda one: bool(one.steps), reverse=True):
        py = y_scale(line.points[-1][1])
        if all(abs(py - other) > FONT + 3 for _, other in taken):
            taken.append((0, py))
            out.append(_text(width - right + 4, py + 4, _cut(line.name, right - 8), "l", row=line.row))
    return "".join(out) + "</svg>"


def standalone(svg: str) -> str:
    """The plot as a file of its own, on white; its colours spelt out, since few programs know CSS variables."""
    colours = dict(pair.split(":") for pair in STYLE.split(";"))
    rules = re.sub(r"var\((--\w+)\)", lambda found: colours[found[1]], RULES).replace("svg ", "")
    head, _, rest = svg.partition(">")
    paper = f'<rect width="100%" height="100%" fill="{colours["--paper"]}"/>'
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n{head} xmlns="http://www.w3.org/2000/svg">'
        f"<style>{rules}</style>{paper}{rest}\n"
    )


def png(svg: str) -> bytes | None:
    """A standalone plot as PNG, twice as many pixels; None where resvg-py is not installed."""
    try:
        import resvg_py
    except ImportError:
        return None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=2))


def _rows(
    marks: Sequence[Mark], values: Sequence[float], x: Axis, title: str, width: int,
    draw: Callable[[Mark, _Scale, float], str], keys: Sequence[tuple[str, str]], groups: Sequence[str],
) -> str:  # fmt: skip
    """One mark a row: its name on the left, on a phone above it."""
    wide = width > 400
    left = 226 if wide else 10
    row_height = 22 if wide else 36
    top, bottom = 8, 44
    legend, lines = _keys(keys, width) if keys else ([], 0)
    bottom += 16 * lines
    height = top + row_height * len(marks) + bottom
    scale = _Scale(values, x, left + 4, width - 16)
    out = [_open(width, height, title)]
    out += _x_ticks(scale, height - bottom, top, width)
    out.append(_text((left + width) / 2, height - bottom + 34, x.label, "t", "middle"))
    out += [item.replace("@", f"{height - bottom + 52 + 16 * line:.0f}") for item, line in legend]
    for place, mark in enumerate(marks):
        base = top + row_height * place
        y = base + (11 if wide else 26)
        name = _cut(mark.name, (left if wide else width) - 12)
        text = _text(left - 8, y + 4, name, "l", "end") if wide else _text(left, base + 12, name, "l")
        out.append(_marked(mark.row, mark.name, text + draw(mark, scale, y)))
    return "".join(out) + "</svg>"


class _Scale:
    """Stored number -> pixel, and the ticks between. A class for what three loops share."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        finite = [value / axis.scale for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        positive = [value for value in finite if value > 0]
        self._log = axis.log and low > 0 and high / low > 4
        if axis.log and not self._log and low <= 0 and positive and high / min(positive) > 4:
            # Zero has no logarithm; it stands at the left edge.
            self._log, low = True, min(positive)
        if low == high:
            low, high = (low * 0.9, high * 1.1) if low else (-0.5, 0.5)
        if not self._log and low > 0 and low < 0.35 * high:
            low = 0.0
        if not self._log and low:
            low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
        self._axis, self._start, self._end = axis, start, end
        self._low, self._high = (math.log(low), math.log(high)) if self._log else (low, high)
        if self._log:
            margin = 0.04 * (self._high - self._low)
            self._low, self._high = self._low - margin, self._high + margin
        steps = max(2, round(abs(end - start) / (70 if end > start else 46)))
        marks = self._log_ticks() if self._log else _nice(low, high, steps)
        self.ticks = [(self._place(mark), _number(mark)) for mark in marks]
        if self._log and end < start:
            kept: list[tuple[float, str]] = []
            for place, text in self.ticks:
                if not kept or abs(kept[-1][0] - place) > FONT + 6:
                    kept.append((place, text))
            self.ticks = kept

    def __call__(self, value: float) -> float:
        return self._place(value / self._axis.scale)

    def _place(self, shown: float) -> float:
        if self._log:
            shown = math.log(shown) if shown > 0 else self._low
        share = (shown - self._low) / (self._high - self._low)
        return self._start + min(max(share, 0.0), 1.0) * (self._end - self._start)

    def _log_ticks(self) -> list[float]:
        low, high = math.exp(max(self._low, -700.0)), math.exp(min(self._high, 700.0))
        decades = range(math.floor(math.log10(low)), min(math.ceil(math.log10(high)), 307) + 1)
        few = math.log10(high / low) > 3
        steps = (1.0,) if few else (1.0, 2.0, 5.0)
        found = [step * 10.0**power for power in decades for step in steps]
        return [mark for mark in found if low <= mark <= high] or [low, high]


def _nice(low: float, high: float, steps: int) -> list[float]:
    """Round numbers between, `steps` of them at most."""
    raw = (high - low) / steps
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_ticks(scale: _Scale, bottom: float, top: float, width: float) -> list[str]:
    out, free = [], -math.inf
    for place, text in scale.ticks:
        out.append(f'<path class="g" d="M{place:.1f} {top}V{bottom}"/>')
        half = _width(text) / 2
        middle = min(max(place, half + 1), width - half - 1)
        if middle - half > free + 5:
            out.append(_text(middle, bottom + 16, text, "t", "middle"))
            free = middle + half
    return out


def _front(marks: Sequence[Mark], more_is_better: bool) -> list[Mark]:
    """Those that none beats in both, from the best `x` on."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (-m.x if more_is_better else m.x, m.y)):
        if not found or mark.y < found[-1].y:
            found.append(mark)
    return found


Box = tuple[float, float, float, float]


def _label(name: str, x: float, y: float, taken: list[Box], bounds: Box) -> tuple[float, float] | None:
    """A free place for a name near its point, (left, baseline), which is then taken; None if there is none."""
    wide = _width(name)
    places = [
        (x + 8, y + 4), (x - 8 - wide, y + 4), (x - wide / 2, y - 9), (x - wide / 2, y + 17),
        (x + 7, y - 6), (x + 7, y + 15), (x - 7 - wide, y - 6), (x - 7 - wide, y + 15),
    ]  # fmt: skip
    for px, py in places:
        box = (px - 2, py - FONT, px + wide + 2, py + 4)
        inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
        if inside and not any(_meet(box, other) for other in taken):
            taken.append(box)
            return px, py
    return None


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(groups: Sequence[str], left: float, y: float) -> list[str]:
    out, x = [], 10.0
    for place, group in enumerate(groups):
        out += [_shape(place, x, y - 4), _text(x + 9, y, group, "t")]
        x += 26 + _width(group)
    return out


def _keys(keys: Sequence[tuple[str, str]], width: int) -> tuple[list[tuple[str, int]], int]:
    """(SVG with `@` for its height, line) of each, and how many lines that is."""
    out, x, line = [], 10.0, 0
    for colour, name in keys:
        wide = 28 + _width(name)
        if x + wide > width - 4 and x > 10:
            x, line = 10.0, line + 1
        out.append((f'<circle class="{colour}" cx="{x + 4:.0f}" cy="@" r="4"/>', line))
        out.append((f'<text class="t" x="{x + 13:.0f}" y="@" dy="4">{_escape(name)}</text>', line))
        x += wide
    return out, line + 1


def _shape(group: int, x: float, y: float) -> str:
    colour = f"c{group % 5}"
    match SHAPES[group % 5]:
        case "circle":
            return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        case "square":
            return f'<rect class="{colour}" x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
        case "triangle":
            return f'<path class="{colour}" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'
        case "diamond":
            return f'<path class="{colour}" d="M{x:.1f} {y - 5.5:.1f}l5 5.5l-5 5.5l-5 -5.5z"/>'
        case _:
            return f'<path class="n{group % 5}" stroke-width="2" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'


def _marked(row: str, words: str, body: str, data: str = "") -> str:
    return f'<g data-r="{row}"{data}><title>{_escape(words)}</title>{body}</g>'


def _open(width: int, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{_escape(title)}">'
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start", row: str = "") -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' data-r="{row}"' if row else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{_escape(words)}</text>'


def _width(words: str) -> float:
    """Pixels that a text takes at most, in the widest of the usual fonts."""
    return 0.66 * FONT * len(words)


def _cut(words: str, room: float) -> str:
    most = max(4, math.floor(room / (0.66 * FONT)))
    return words if len(words) <= most else words[: most - 1] + "…"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _escape(words: str) -> str:
    """Text in XML: markup escaped, and the characters that XML does not know left out."""
    return html.escape("".join(mark for mark in words if mark.isprintable()), quote=True)
