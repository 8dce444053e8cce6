"""What a server's answers under load come to: latencies, throughput, and how much of it kept limits.

    TTFT  from sending a request to its first token
    ITL   between an arrival of tokens and the next; a request's own is the time that 99 % of its waits are below
    TPOT  from the first token to the last, over the tokens after the first arrival's
    E2E   from sending to the answer's end

Requests and tokens a second are over the time from the first request's sending to the last one's end, as `vllm bench
serve` has them. **Goodput** counts the requests whose answers came whole and kept every limit (Y. Zhong et al.,
DistServe, OSDI 2024); a fault keeps none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from workbench.records import Limited, LoadPoint, Request, Row, Seconds
from workbench.report.estimates import quantile

Spread = tuple[float, float, float] | None
"""Median, 90 % and 99 %, seconds; None without a sample."""


def own(request: Request, what: Limited) -> float | None:
    """A latency of one answer, seconds; None where it has none, as one token has no time between tokens."""
    if what == "ttft":
        return request.first_token_s
    if what == "e2e":
        return request.end_s
    if not request.gaps_s:
        return None
    if what == "itl":
        return quantile(sorted(request.gaps_s), 0.99)
    later = sum(request.gained[1:])
    return sum(request.gaps_s) / later if later else None


def keeps(request: Request, limits: Mapping[Limited, Seconds]) -> bool:
    """Whether an answer came, and kept every limit that is about it."""
    if request.error:
        return False
    return all((value := own(request, what)) is None or value <= most for what, most in limits.items())


def kept(requests: Sequence[Request], limits: Mapping[Limited, Seconds]) -> int:
    """How many answers keep the limits, at a rate that can go on: where the queue grows as long as requests come, no
    more than are answered as fast as they come, though so few requests may all be answered within the limits."""
    return min(sum(keeps(each, limits) for each in requests), math.floor(_pace(requests) * len(requests)))


def _pace(requests: Sequence[Request]) -> float:
    """Answers a second over requests a second; 1 where the server keeps up. By how much later the last quarter of the
    answers came than the first did, medians, over the time between the two: latencies scatter, so that a tenth more is
    nothing."""
    answered = sorted((each for each in requests if not each.error), key=lambda each: each.sent_s)
    if len(answered) < 8:
        return 1.0
    first, last = answered[: len(answered) // 4], answered[-(len(answered) // 4) :]
    apart_s = median(each.sent_s for each in last) - median(each.sent_s for each in first)
    later_s = max(0.0, median(each.end_s for each in last) - median(each.end_s for each in first))
    return 1.0 if later_s <= apart_s / 9 else apart_s / (apart_s + later_s)


@dataclass(frozen=True)
class Figures:
    """A load point as people read it."""

    name: str
    """As the load point has it."""
    asked: int
    failed: int
    output_tok_s: float
    requests_s: float
    ttft_s: Spread
    itl_s: Spread
    """Over all waits of all answers."""
    tpot_s: Spread
    e2e_s: Spread
    goodput_req_s: float | None
    """None without limits."""
    kept: float | None
    """Share of the requests that kept the limits."""
    late_s: float
    """The client's own delay: the longest that a request was sent too late, or that its clock ticked too late in 99 of
    100 ticks."""


def figures(points: Sequence[LoadPoint], limits: Mapping[Limited, Seconds]) -> Figures | None:
    """Of one load and its repeats; None without requests."""
    asked = [request for point in points for request in point.counted]
    if not asked:
        return None
    good = [request for request in asked if not request.error]
    seconds = sum(map(_seconds, points))
    kept = sum(keeps(request, limits) for request in asked) if limits else None

    def spread(what: Limited) -> Spread:
        return _spread([value for each in good if (value := own(each, what)) is not None])

    return Figures(
        name=points[0].name,
        asked=len(asked),
        failed=len(asked) - len(good),
        output_tok_s=sum(each.new_tokens for each in good) / seconds if seconds else 0.0,
        requests_s=len(good) / seconds if seconds else 0.0,
        ttft_s=spread("ttft"),
        itl_s=_spread([gap for each in good for gap in each.gaps_s]),
        tpot_s=spread("tpot"),
        e2e_s=spread("e2e"),
        goodput_req_s=kept / seconds if kept is not None and seconds else None,
        kept=kept / len(asked) if kept is not None else None,
        late_s=max([*(each.late_s for each in asked), *(lag for point in points for lag in point.lag_s[1:2])]),
    )


def _seconds(point: LoadPoint) -> float:
    """From the first request's sending to the last one's end."""
    asked = point.counted
    return max(each.sent_s + each.end_s for each in asked) - min(each.sent_s for each in asked) if asked else 0.0


def output_rates(row: Row) -> dict[int, list[float]]:
    """Output tokens a second of each repeat, by the number of requests at once of a closed loop."""
    found: dict[int, list[float]] = {}
    for point in _points(row):
        figure = figures([point], {})
        if point.arrivals == "closed" and figure and figure.output_tok_s:
            found.setdefault(round(point.level), []).append(figure.output_tok_s)
    return found


def all_figures(row: Row) -> list[Figures]:
    """Of every load of a row."""
    serving = row.measurement.serving if row.measurement else None
    loads: dict[str, list[LoadPoint]] = {}
    for point in _points(row):
        loads.setdefault(point.name, []).append(point)
    return [found for each in loads.values() if serving and (found := figures(each, serving.limits))]


def _points(row: Row) -> list[LoadPoint]:
    serving = row.measurement.serving if row.measurement else None
    return serving.points if serving else []


def goodput(row: Row) -> float | None:
    """Requests a second that kept the limits, at the load point where they were most; None without limits."""
    return max((each.goodput_req_s for each in all_figures(row) if each.goodput_req_s is not None), default=None)


def largest_rate(row: Row) -> float | None:
    """Requests a second: the lower end of the interval of the largest rate that keeps the limits."""
    serving = row.measurement.serving if row.measurement else None
    return serving.largest_rate[0] if serving and serving.largest_rate else None


def _spread(values: list[float]) -> Spread:
    found = sorted(values)
    return (quantile(found, 0.5), quantile(found, 0.9), quantile(found, 0.99)) if found else None
