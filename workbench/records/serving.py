"""What a server answered under load: a sample a request, so that any limit can be asked of it later."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from workbench.records.limits import Count, Positive, Seconds, Size, Timed, limit

Arrivals = Literal["closed", "poisson", "constant"]
"""When requests are sent: the next when one has ended, or at a rate, whatever became of those before."""
Limited = Literal["ttft", "itl", "tpot", "e2e"]
"""What a limit is of: time to the first token, between tokens, per output token, until the end."""


def longest_mixed(new_tokens: int) -> int:
    """New tokens of the longest of `mixed_lengths`."""
    return max(1, new_tokens * 3 // 2)


def mixed_lengths(new_tokens: int, many: int, chance: random.Random) -> list[int]:
    """New tokens of each of so many requests under load: from half to one and a half of what one alone is asked for."""
    return [chance.randint(max(1, new_tokens // 2), longest_mixed(new_tokens)) for _ in range(many)]


@dataclass(frozen=True)
class Request:
    """One request and when its tokens came, by the client's clock."""

    sent_s: Size
    """Since the point began."""
    late_s: Size
    """How much later it was sent than it should have been: the client's own delay."""
    prompt_tokens: Count
    end_s: Timed
    """From sending to the answer's end, or to the fault."""
    first_token_s: Timed | None = None
    """From sending to the first token."""
    gaps_s: list[Size] = field(default_factory=list)
    """Between an arrival of tokens and the next."""
    gained: list[Count] = field(default_factory=list)
    """Tokens that each arrival brought, the first's too."""
    error: str = ""
    """Why it is no answer; what had come is kept."""

    def __post_init__(self) -> None:
        if len(self.gained) != len(self.gaps_s) + (self.first_token_s is not None):
            raise ValueError("an arrival has not a time and a number of tokens")

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(self.gained)

    @property
    def steps_s(self) -> list[float]:
        """`gaps_s` as a `Speed` has them: two chunks of one packet come at once, and no clock tells them apart."""
        return [max(1e-6, gap) for gap in self.gaps_s]


@dataclass(frozen=True)
class LoadPoint:
    """Requests sent in one way, in the order in which they were sent."""

    arrivals: Arrivals
    level: Size
    """Requests at once of a closed loop; requests a second of an open one."""
    requests: list[Request]
    warmup: Count = 0
    """So many of the first ones are in no figure: the server was not yet as busy as it would be."""
    lag_s: list[Size] = field(default_factory=list)
    """How much too late the client's own clock ticked, every 10 ms: median, 99 %, the most."""

    @property
    def name(self) -> str:
        """`4 at once`, `2.5/s poisson`."""
        return f"{self.level:g} at once" if self.arrivals == "closed" else f"{self.level:.3g}/s {self.arrivals}"

    @property
    def counted(self) -> list[Request]:
        """Without those of the warm-up."""
        return self.requests[self.warmup :]


@dataclass(frozen=True)
class Serving:
    """A server under load."""

    points: list[LoadPoint] = field(default_factory=list)
    limits: dict[Limited, Seconds] = field(default_factory=dict)
    """What a request had to keep to count for goodput."""
    largest_rate: Annotated[list[Size], limit(min_length=2, max_length=2)] | None = None
    """Requests a second, lower and upper end of a 95 % interval: the largest rate at which 95 of 100 requests keep the
    limits."""
    largest_rate_trials: list[tuple[Size, Count, Positive]] = field(default_factory=list)
    """What it was found by: a rate, how many kept the limits, and how many were asked."""


def faults_of(points: Sequence[LoadPoint]) -> list[str]:
    """How many requests of each load failed, and the commonest reason."""
    found: dict[str, list[Request]] = {}
    for point in points:
        found.setdefault(point.name, []).extend(point.counted)
    told = []
    for name, requests in found.items():
        if errors := Counter(each.error for each in requests if each.error):
            reason, many = errors.most_common(1)[0]
            told.append(f"{name}: {errors.total()} of {len(requests)} requests failed, {many} so: {reason}")
    return told
