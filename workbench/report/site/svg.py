"""The parts that every chart is drawn from: scales, axes, labels, legends, as SVG text."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

FONT = 12
"""Pixels, of every text in a plot."""
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
"""Shapes by engine, beside the colours: not everybody sees colours, and not every printer has them."""
WIDE, NARROW, WHOLE = 584, 340, 1200
"""Pixels: a column of a desktop's page, a phone's, and the whole of a desktop's."""

COLOURS = (
    "--ink:#1c2430;--soft:#5c6675;--rule:#d7dce3;--paper:#fff;--hover:#f3f5f8;"
    "--c0:#1f6feb;--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#a16207;"
    "--p0:#1f6feb;--p1:#7aa7e9;--p2:#c2410c;--p3:#e0a07d;--p4:#15803d;--p5:#8fc7a0;--p6:#8a94a3;--p7:#4d5765"
)
DARK_COLOURS = (
    "--ink:#e6eaf0;--soft:#9aa5b4;--rule:#343c48;--paper:#12161c;--hover:#1b212a;"
    "--c0:#6ea8fe;--c1:#fb923c;--c2:#4ade80;--c3:#c084fc;--c4:#facc15;"
    "--p0:#6ea8fe;--p1:#3d6198;--p2:#fb923c;--p3:#95562a;--p4:#4ade80;--p5:#2f7d4a;--p6:#7b8595;--p7:#c3ccd8"
)
RULES = (
    f"svg text{{font-size:{FONT}px;font-family:system-ui,'DejaVu Sans',sans-serif;fill:var(--ink)}}"
    "svg .t{fill:var(--soft)}svg .l{paint-order:stroke;stroke:var(--paper);stroke-width:3px}"
    "svg .g,svg .k{stroke:var(--rule);stroke-width:1;fill:none}svg .k{stroke:var(--soft);opacity:.6}"
    "svg .e{stroke-width:1.2;fill:none;opacity:.45}svg a{fill-opacity:.75}"
    "svg .f{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3;fill:none}svg .h{stroke:var(--paper)}"
    + "".join(f"svg .c{i}{{fill:var(--c{i});stroke:var(--c{i})}}" for i in range(5))
    + "".join(f"svg .n{i}{{fill:none;stroke:var(--c{i})}}" for i in range(5))
    + "".join(f"svg .p{i}{{fill:var(--p{i})}}" for i in range(8))
)


@dataclass(frozen=True)
class Axis:
    """How numbers of one kind are shown."""

    label: str
    scale: float = 1.0
    """What a stored number is divided by."""
    log: bool = False
    """Whether a logarithmic axis is asked for; it is granted where the values span more than a factor of four."""


def standalone(svg: str) -> str:
    """The plot as a file of its own, on white; its colours spelt out, since few programs know CSS variables."""
    colours = dict(pair.split(":") for pair in COLOURS.split(";"))
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


class Scale:
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
        self.ticks = [(self._place(mark), number_text(mark)) for mark in marks]
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


def y_ticks(scale: Scale, left: float, right: float) -> list[str]:
    """Lines across the plot, each with its number on the left."""
    out = []
    for place, text in scale.ticks:
        out.append(f'<path class="g" d="M{left} {place:.1f}H{right}"/>')
        out.append(text_element(left - 6, place + 4, text, "t", "end"))
    return out


def x_ticks(scale: Scale, bottom: float, top: float, width: float) -> list[str]:
    out, free = [], -math.inf
    for place, text in scale.ticks:
        out.append(f'<path class="g" d="M{place:.1f} {top}V{bottom}"/>')
        half = text_width(text) / 2
        middle = min(max(place, half + 1), width - half - 1)
        if middle - half > free + 5:
            out.append(text_element(middle, bottom + 16, text, "t", "middle"))
            free = middle + half
    return out


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """Where a name is written, and from where to where a line leads to it if it is not beside its point."""

    left: float
    baseline: float
    leader: Box | None = None


def place_label(words: str, x: float, y: float, radius: float, taken: list[Box], bounds: Box) -> Label | None:
    """The free place for a name that is nearest to its point, which is then taken; None if the plot is full."""
    wide = text_width(words)
    for ring in range(40):
        away = radius + 4 + 9 * ring
        for turn in TURNS:
            # The box touches the ring from outside: its corner or edge that faces the point lies on it.
            edge_x, edge_y = x + away * math.cos(turn), y + away * math.sin(turn)
            left = edge_x - wide * (1 - math.cos(turn)) / 2
            top = edge_y - FONT * (1 - math.sin(turn)) / 2
            box = (left - 2, top - 1, left + wide + 2, top + FONT + 2)
            inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                near = min(max(x, left), left + wide), min(max(y, top), top + FONT)
                return Label(left, top + FONT - 2, (x, y, *near) if ring > 1 else None)
    return None


TURNS = [math.tau * step / 16 for step in (0, 8, 12, 4, 15, 1, 9, 7, 14, 2, 10, 6, 13, 3, 11, 5)]
"""Directions from a point, the most legible first: right, left, above, below."""


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def draw_legend(groups: Sequence[str], left: float, y: float) -> list[str]:
    out, x = [], left
    for place, group in enumerate(groups):
        out += [shape_of_mark(place, x, y - 4), text_element(x + 9, y, group, "t")]
        x += 34 + text_width(group)
    return out


def legend_keys(keys: Sequence[tuple[str, str]], width: int) -> tuple[list[tuple[str, int]], int]:
    """(SVG with `@` for its height, line) of each, and how many lines that is."""
    out, x, line = [], 10.0, 0
    for colour, name in keys:
        wide = 28 + text_width(name)
        if x + wide > width - 4 and x > 10:
            x, line = 10.0, line + 1
        out.append((f'<circle class="{colour}" cx="{x + 4:.0f}" cy="@" r="4"/>', line))
        out.append((f'<text class="t" x="{x + 13:.0f}" y="@" dy="4">{escape_text(name)}</text>', line))
        x += wide
    return out, line + 1


def shape_of_mark(group: int, x: float, y: float, radius: float = 4) -> str:
    """A group's shape in its colour, with the area of a circle of that radius."""
    colour, r = f"c{group % 5}", radius
    match SHAPES[group % 5]:
        case "circle":
            return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
        case "square":
            a = 0.886 * r
            return f'<rect class="{colour}" x="{x - a:.1f}" y="{y - a:.1f}" width="{2 * a:.1f}" height="{2 * a:.1f}"/>'
        case "triangle":
            a = 1.347 * r
            return f'<path class="{colour}" d="M{x:.1f} {y - 1.155 * a:.1f}l{a:.1f} {1.732 * a:.1f}h{-2 * a:.1f}z"/>'
        case "diamond":
            a = 1.253 * r
            sides = f"l{a:.1f} {a:.1f}l{-a:.1f} {a:.1f}l{-a:.1f} {-a:.1f}z"
            return f'<path class="{colour}" d="M{x:.1f} {y - a:.1f}{sides}"/>'
        case _:
            return (
                f'<path class="n{group % 5}" stroke-width="2" '
                f'd="M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"/>'
            )


def marked(row: str, words: str, body: str) -> str:
    return f'<g data-r="{row}"><title>{escape_text(words)}</title>{body}</g>'


def linked(row: str, words: str, body: str, data: str = "") -> str:
    """A mark that leads to its row in full, by a click or by Enter."""
    name = escape_text(words)
    return f'<a href="#{row}" data-r="{row}"{data}><title>{name}</title>{body}</a>'


def open_svg(width: int, height: int, title: str, role: str = "img") -> str:
    """The beginning of a plot; its role is `group` where there is something in it to be reached."""
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="{role}" '
        f'aria-label="{escape_text(title)}">'
    )


def text_element(x: float, y: float, words: str, kind: str, anchor: str = "start", row: str = "") -> str:
    more = f' text-anchor="{anchor}"' if anchor != "start" else ""
    more += f' data-r="{row}"' if row else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{more}>{escape_text(words)}</text>'


def text_width(words: str) -> float:
    """Pixels that a text takes at most, in the widest of the usual fonts (DejaVu Sans)."""
    return FONT * sum(0.41 if mark in NARROW_MARKS else 1.0 if mark in WIDE_MARKS else 0.66 for mark in words)


NARROW_MARKS, WIDE_MARKS = frozenset(" -.,:;'|!()[]fijlrtI"), frozenset("mwMWO@%")


def cut_text(words: str, room: float) -> str:
    """As much of a text as there is room for."""
    while len(words) > 4 and text_width(words) > room:
        words = words.removesuffix("…")[:-1] + "…"
    return words


def number_text(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def escape_text(words: str) -> str:
    """Text in XML: markup escaped, and the characters that XML does not know left out."""
    return html.escape("".join(mark for mark in words if mark.isprintable()), quote=True)
