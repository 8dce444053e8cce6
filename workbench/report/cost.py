"""What tokens cost: on a machine by what it was measured to serve, at an API by its list.

With D requests a day of p prompt and n new tokens, of which the busiest hour has k times the average; a machine that
serves c requests a second within the limits and costs h an hour; an API that charges i and o a million tokens:

    machines   M = max(1, ceil(D k / 86,400 c))
    a month    30.4375 x 24 h M,  or  30.4375 D (p i + n o) / 1e6
    a million tokens    a month / (30.4375 D (p + n)) x 1e6
    of a machine that is always full    h 1e6 / (3,600 c (p + n))
    break-even 24 h / ((p i + n o) / 1e6) requests a day, if one machine serves so many

A machine is paid for by the hour whether it is asked or not. `c` is the lower end of the largest rate's interval where
that was searched with these limits; else the most requests a second that were answered at a load of which 95 of 100
requests kept them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.records import Limited, LoadPoint, Row, Seconds
from workbench.report.estimates import quantile
from workbench.report.loads import figures
from workbench.report.selection import labels_of, pair_of

if TYPE_CHECKING:
    from workbench.recipe.endpoints import TokenPrice
    from workbench.recipe.prices import Prices, Traffic

DAYS = 365.25 / 12
"""Of a month."""
DAY_S = 86400
KEPT = 0.95
"""Share of the requests that must keep the limits, as for the largest rate."""
ALIKE = 0.1
"""A traffic whose lengths are this near to those that were measured is that traffic."""


@dataclass(frozen=True)
class Capacity:
    """What one machine serves."""

    requests_s: float
    prompt_tokens: float
    new_tokens: float
    how: str
    """By which measurement."""


@dataclass(frozen=True)
class Offer:
    """One way to have the tokens."""

    name: str
    month: float
    """At the given traffic."""
    million: float
    """Tokens of prompts and answers, at the given traffic."""
    hour: float | None = None
    """What a machine costs; None of an API."""
    machines: int | None = None
    requests_s: float | None = None
    """What one machine serves."""
    full: float | None = None
    """A million tokens of a machine that is always full."""
    break_even: dict[str, float | None] = field(default_factory=dict)
    """Requests a day from which it costs no more than an API, by its name; None: it does not, full as it may be."""
    how: str = ""


@dataclass(frozen=True)
class Costs:
    """All offers, the cheapest a month first; and why a row is none."""

    prices: Prices
    prompt_tokens: float
    new_tokens: float
    offers: list[Offer]
    left_out: dict[str, str]

    @property
    def traffic(self) -> Traffic:
        """What is asked for."""
        return self.prices.traffic

    def month_of(self, offer: Offer, requests_a_day: float) -> float:
        """What it costs a month at another traffic."""
        if offer.hour is None or offer.requests_s is None:
            return DAYS * requests_a_day * a_request(self.prices.apis[offer.name], self.prompt_tokens, self.new_tokens)
        return DAYS * 24 * offer.hour * machines(requests_a_day, self.traffic.peak, offer.requests_s)

    @property
    def assumptions(self) -> list[str]:
        """What the figures rest on."""
        told = [
            f"a request is {self.prompt_tokens:,.4g} prompt and {self.new_tokens:,.4g} new tokens, each day has "
            f"{self.traffic.requests_a_day:,.6g}, its busiest hour {self.traffic.peak:g} times the average",
            f"a month is {DAYS:g} days; machines are paid for by the hour, asked or not, and share the load evenly",
            "prices are those of the file: no taxes, no staff, no network, no discounts",
        ]
        return told + [f"{each.name}: {each.how}" for each in self.offers if each.how]

    def __str__(self) -> str:
        apis = [each.name for each in self.offers if each.hour is None]
        head = ["offer", "machines", "requests/s each", "a month", "a million tokens", "always full"]
        lines = [
            [*head, *(f"requests a day to beat {api}" for api in apis)],
            *([*_cells(each), *(_even(each, api) for api in apis)] for each in self.offers),
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = []
        for name, *cells in lines:
            told = [cell.rjust(wide) for cell, wide in zip(cells, widths[1:], strict=True)]
            rows.append("  ".join([name.ljust(widths[0]), *told]).rstrip())
        notes = [f"- {text}" for text in self.assumptions]
        notes += [f"- {name}: left out: {reason}" for name, reason in self.left_out.items()]
        money = f"prices in {self.prices.currency}" if self.prices.currency else "prices as in the file"
        return "\n".join([money, "", *rows, "", *notes, ""])


def _cells(offer: Offer) -> list[str]:
    def money(value: float | None) -> str:
        return "-" if value is None else f"{value:,.2f}" if value >= 1 else f"{value:.4g}"

    return [
        offer.name,
        "-" if offer.machines is None else f"{offer.machines:,}",
        "-" if offer.requests_s is None else f"{offer.requests_s:.3g}",
        money(offer.month),
        money(offer.million),
        money(offer.full),
    ]


def _even(offer: Offer, api: str) -> str:
    if offer.hour is None:
        return "-"
    found = offer.break_even.get(api)
    return "never" if found is None else f"{math.ceil(found):,}"


def a_request(price: TokenPrice, prompt_tokens: float, new_tokens: float) -> float:
    """What an API takes for one."""
    return (prompt_tokens * price.input + new_tokens * price.output) / 1e6


def machines(requests_a_day: float, peak: float, requests_s: float) -> int:
    """How many serve the busiest hour."""
    # What lies within rounding of a whole number is that.
    return max(1, math.ceil(requests_a_day * peak / (DAY_S * requests_s) - 1e-9))


def capacity(row: Row, limits: Mapping[Limited, Seconds]) -> Capacity | str:
    """What a row's server was measured to serve within the limits (none given: its own); or why that is not known."""
    serving = row.measurement.serving if row.measurement else None
    if row.error or serving is None or not serving.points:
        return row.error or "no load was measured: `profile --endpoint`, or a server as an engine with `requests`"
    wanted = dict(limits or serving.limits)
    loads: dict[str, list[LoadPoint]] = {}
    for point in serving.points:
        loads.setdefault(point.name, []).append(point)
    found = [(each, points) for points in loads.values() if (each := figures(points, wanted)) and each.requests_s]
    good = [(each, points) for each, points in found if each.kept is None or each.kept >= KEPT]
    if not good:
        return "at no load that was measured did 95 of 100 requests keep the limits"
    best, points = max(good, key=lambda pair: pair[0].goodput_req_s or pair[0].requests_s)
    answered = [each for point in points for each in point.counted if not each.error]
    prompt = quantile(sorted(float(each.prompt_tokens) for each in answered), 0.5)
    new = sum(each.new_tokens for each in answered) / len(answered)
    told = ", ".join(f"{name} {most:g} s" for name, most in wanted.items())
    if wanted and wanted == dict(serving.limits) and serving.largest_rate and serving.largest_rate[0] > 0:
        rate = serving.largest_rate[0]
        return Capacity(rate, prompt, new, f"the largest rate within {told}, lower end of its interval")
    rate = best.goodput_req_s or best.requests_s
    return Capacity(rate, prompt, new, f"measured {best.name}, {f'within {told}' if wanted else 'with no limits set'}")


def costs(rows: Sequence[Row], prices: Prices, limits: Mapping[Limited, Seconds]) -> Costs:
    """What the traffic costs on each row's machine, of those that have a price, and at each API. Without lengths of its
    own the traffic has those of the first row that serves it."""
    left_out: dict[str, str] = {}
    able: list[tuple[str, float, Capacity]] = []
    traffic = prices.traffic
    prompt, new = traffic.prompt_tokens or 0.0, traffic.new_tokens or 0.0
    for name, row in _named(rows):
        found = capacity(row, limits)
        if row.machine.name not in prices.machines:
            left_out[name] = f"no price of the machine '{row.machine.name}'"
        elif isinstance(found, str):
            left_out[name] = found
        else:
            prompt, new = prompt or found.prompt_tokens, new or found.new_tokens
            if reason := _unlike(prompt, new, found):
                left_out[name] = reason
            else:
                able.append((name, prices.machines[row.machine.name], found))
    if not prompt or not new:
        reason = "nothing was measured, and `traffic` does not say how long requests and answers are"
        return Costs(prices, prompt, new, [], left_out | dict.fromkeys(prices.apis, reason))
    offers = [_own(name, hour, found, prices, prompt, new) for name, hour, found in able]
    for api, price in prices.apis.items():
        each = a_request(price, prompt, new)
        offers.append(Offer(api, DAYS * traffic.requests_a_day * each, each * 1e6 / (prompt + new)))
    return Costs(prices, prompt, new, sorted(offers, key=lambda each: each.month), left_out)


def _own(name: str, hour: float, found: Capacity, prices: Prices, prompt: float, new: float) -> Offer:
    day, peak = prices.traffic.requests_a_day, prices.traffic.peak
    many, most = machines(day, peak, found.requests_s), DAY_S * found.requests_s / peak
    month = DAYS * 24 * hour * many
    even: dict[str, float | None] = {}
    for api, price in prices.apis.items():
        each = a_request(price, prompt, new)
        even[api] = 24 * hour / each if each and 24 * hour / each <= most else None
    return Offer(
        name=name,
        month=month,
        million=month * 1e6 / (DAYS * day * (prompt + new)),
        hour=hour,
        machines=many,
        requests_s=found.requests_s,
        full=hour * 1e6 / (3600 * found.requests_s * (prompt + new)),
        break_even=even,
        how=found.how,
    )


def _named(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """The rows, each with what it is called here, unlike any other: by the options that differ, else by a number."""
    labels = {
        name: labels_of({pair_of(row): row for row in rows if row.machine.name == name})
        for name in dict.fromkeys(row.machine.name for row in rows)
    }
    seen = Counter[str]()
    for row in rows:
        name = f"{labels[row.machine.name][pair_of(row)]}, {row.machine.name}"
        seen[name] += 1
        yield f"{name} ({seen[name]})" if seen[name] > 1 else name, row


def _unlike(prompt: float, new: float, found: Capacity) -> str:
    """Why a measurement says nothing of requests and answers so long; empty if it does."""
    for wanted, measured, what in (
        (prompt, found.prompt_tokens, "prompt tokens"),
        (new, found.new_tokens, "new tokens"),
    ):
        if abs(wanted - measured) > ALIKE * wanted:
            return f"measured with {measured:.4g} {what}, the traffic has {wanted:.4g}: measure it with those"
    return ""
