"""What a month costs over the requests a day, as lines: of machines in steps, of APIs straight."""

from __future__ import annotations

import math

from workbench.report.cost import Costs
from workbench.report.site.svg import (
    FONT,
    WHOLE,
    Axis,
    Scale,
    cut_text,
    marked,
    open_svg,
    text_element,
    text_width,
    x_ticks,
    y_ticks,
)

DECADES = 2
"""Below and above the traffic that was asked for."""
STEPS = 400


def cost_plot(found: Costs, width: int = WHOLE) -> str:
    """Logarithmic in both; a line across at the traffic that was asked for."""
    top, bottom, right, height = 30, 50, 330, 520
    day = found.traffic.requests_a_day
    days = [day * 10 ** (DECADES * (2 * step / STEPS - 1)) for step in range(STEPS + 1)]
    lines = [(offer, [found.month_of(offer, each) for each in days]) for offer in found.offers]
    money = f"a month, {found.prices.currency}" if found.prices.currency else "a month"
    y = Scale([value for _, values in lines for value in values], Axis(money, log=True), height - bottom, top)
    left = 12 + max(text_width(text) for _, text in y.ticks)
    x = Scale(days, Axis("requests a day", log=True), left + 6, width - right)
    out = [open_svg(width, height, "cost a month over requests a day"), text_element(4, 14, money, "t")]
    out += y_ticks(y, left, width - right)
    out += x_ticks(x, height - bottom, top, width)
    out.append(text_element((left + width - right) / 2, height - bottom + 36, "requests a day", "t", "middle"))
    out.append(f'<path class="k" d="M{x(day):.1f} {top}V{height - bottom}"/>')
    free = math.inf
    for group, (offer, values) in sorted(enumerate(lines), key=lambda each: -each[1][1][-1]):
        pairs = zip(days, values, strict=True)
        path = "L".join(f"{x(each):.1f} {y(value):.1f}" for each, value in pairs)
        dashed = ' stroke-dasharray="6 4"' if offer.hour is None else ""
        line = f'<path class="n{group % 5}" stroke-width="1.8"{dashed} d="M{path}" data-y="{offer.month!r}"/>'
        out.append(marked(f"offer{group}", offer.name, line))
        # From the highest line down: each name below the last.
        at = y(values[-1]) + 4
        at = at if free is math.inf else max(at, free + FONT + 3)
        free = at
        out.append(text_element(width - right + 6, at, cut_text(offer.name, right - 10), "l"))
    return "".join(out) + "</svg>"
