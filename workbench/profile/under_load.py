"""A server measured: one answer at a time, then so many at once, so many a second, and the largest rate in limits.

One at a time, answers of one length make the samples of speed that any engine has (`Speed`), so that tables, compare
and recommend need not know that they came over HTTP. The fastest of them is also what no answer to a fresh prompt can
be much faster than.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from workbench.console import Show
from workbench.profile.largest_rate import largest_rate
from workbench.records import (
    Limited,
    LoadPoint,
    Request,
    Serving,
    Speed,
    Workload,
    faults_of,
    longest_mixed,
    mixed_lengths,
)
from workbench.report import loads
from workbench.serving.asking import counting_of, dialect_of, length_of, model_of
from workbench.serving.client import Answer, Client, Dialect, Wanted
from workbench.serving.faults import Gone
from workbench.serving.load import Cut, closed, opened
from workbench.serving.prompts import Prompts, wanted_of
from workbench.serving.stream import How

LATE = 0.1
"""The client's own delay from which it is told, as a share of the median time between tokens."""
WARMUP = 0.25
"""So many more requests of an open point, before those that count."""
WAKE_TOKENS = 2
AT_ONCE_S = 20e-6
"""Seconds a token that none is made in: faster ones waited somewhere and were sent together."""
Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Wish:
    """What is to be asked of a server."""

    prompt_tokens: int = 512
    new_tokens: int = 64
    """One answer at a time has so many; under load they have from half to one and a half of that."""
    concurrency: Sequence[int] = (4, 16)
    rates: Sequence[float] = ()
    """Requests a second."""
    arrivals: Literal["poisson", "constant"] = "poisson"
    requests: int = 100
    """Of each load point and each trial."""
    limits: Mapping[Limited, float] = field(default_factory=dict)
    """Seconds; with any, the largest rate that keeps them is searched."""
    repeats: int = 5
    seed: int = 0
    as_asked: Workload | None = None
    """The recipe's, where one asks."""

    @property
    def options(self) -> dict[str, object]:
        """As a row has them: what makes two rows measurements of one thing."""
        found: dict[str, object] = {"concurrency": list(self.concurrency), "requests": self.requests}
        found |= {"rates": list(self.rates), "arrivals": self.arrivals} if self.rates or self.limits else {}
        return found | ({"limits": dict(self.limits)} if self.limits else {})

    @property
    def workload(self) -> Workload:
        """The same as any engine's."""
        if self.as_asked:
            return self.as_asked
        batches = [1, *(slots for slots in self.concurrency if slots > 1)]
        return Workload([self.prompt_tokens], self.new_tokens, batches, self.repeats, seed=self.seed)


@dataclass
class Found:
    """What is known of a server so far; complete unless `error` says why not."""

    dialect: Dialect = Dialect("")
    how: How | None = None
    """What tokens were counted by."""
    single: list[Request] = field(default_factory=list)
    """One at a time."""
    serving: Serving = field(default_factory=Serving)
    error: str | None = None

    def speeds(self, wish: Wish) -> list[Speed]:
        """The samples of the answers that came one at a time."""
        good = [each for each in self.single if not each.error and each.first_token_s]
        if not good:
            return []
        steps = [[] if _at_once(each) else each.steps_s for each in good]
        return [
            Speed(
                prompt_tokens=max(1, round(sum(each.prompt_tokens for each in good) / len(good))),
                new_tokens=wish.new_tokens,
                batch=1,
                first_token_s=[each.first_token_s or 0.0 for each in good],
                step_s=steps,
                step_tokens=[each.gained[1:] if own else [] for own, each in zip(steps, good, strict=True)],
            )
        ]

    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        told = faults_of([LoadPoint("closed", 1, self.single), *self.serving.points])
        for point in self.serving.points:
            own = loads.figures([point], {})
            if own and own.itl_s and own.late_s > LATE * own.itl_s[0]:
                told.append(
                    f"{own.name}: the client itself was up to {own.late_s * 1e3:.1f} ms late, between tokens are "
                    f"{own.itl_s[0] * 1e3:.1f} ms: measure from a machine with processors to spare"
                )
        if any(map(_at_once, self.single)):
            told.append("answers came all at once, not as they were made: no decoding speed of those")
        several = sum(each.new_tokens for each in self.single) > 1.1 * sum(len(each.gained) for each in self.single)
        if several:
            told.append("its chunks hold several tokens: the time between tokens is that between chunks")
        return told


def _at_once(request: Request) -> bool:
    """Whether an answer's tokens came together, as from a server that holds them back."""
    return sum(request.gaps_s) < AT_ONCE_S * sum(request.gained[1:])


async def introduce(client: Client, model: str | None, key_variable: str | None, wish: Wish, found: Found) -> None:
    """Find out how the server wants to be asked. Raises `UserError` where it cannot be asked at all."""
    found.serving = Serving(limits=dict(wish.limits))
    found.dialect = await dialect_of(client, await model_of(client, model, key_variable), key_variable)
    found.dialect, found.how = await counting_of(client, found.dialect)


async def measure(client: Client, wish: Wish, show: Show, found: Found) -> None:
    """Fill in what is found, as far as it gets. Raises `UserError` where the server takes no prompts of this length."""
    await _UnderLoad(client, wish, show, found).all_points()


class _UnderLoad:
    """One server, how long its prompts are, and what is found."""

    def __init__(self, client: Client, wish: Wish, show: Show, found: Found) -> None:
        self._client, self._wish, self._show, self._found = client, wish, show, found
        self._prompts, self._chance = Prompts(wish.seed), random.Random(wish.seed + 1)
        self._characters = 0

    async def all_points(self) -> None:
        """Every point of the wish, until the server is gone."""
        wish, found = self._wish, self._found
        self._characters = await length_of(
            self._client, found.dialect, self._prompts, wish.prompt_tokens, longest_mixed(wish.new_tokens)
        )
        with self._show.task("one at a time") as progress:
            await self._one_at_a_time(progress)
        for slots in wish.concurrency:
            if not found.error:
                with self._show.task(f"{slots} at once"):
                    self._keep(*await self._closed(slots))
        for rate in wish.rates:
            if not found.error:
                with self._show.task(f"{rate:g} requests a second"):
                    self._keep(*await self._opened(rate))
        if wish.limits and not found.error:
            with self._show.task("largest rate") as progress:
                await self._search(progress)

    async def _ask(self, wanted: Wanted) -> Answer:
        return await self._client.stream(self._found.dialect, wanted)

    def _fresh(self, lengths: list[int]) -> list[Wanted]:
        return wanted_of(self._prompts, self._characters, self._wish.prompt_tokens, lengths)

    def _drawn(self, many: int) -> list[Wanted]:
        """Requests for answers of mixed lengths."""
        return self._fresh(mixed_lengths(self._wish.new_tokens, many, self._chance))

    async def _one_at_a_time(self, progress: Progress) -> None:
        wish, found = self._wish, self._found
        for done, wanted in enumerate(self._fresh([wish.new_tokens] * (wish.repeats + 1))):
            progress(done, wish.repeats + 1, "")
            answer = await self._ask(wanted)
            if done:
                found.single.append(answer.request)
            if isinstance(answer.fault, Gone):
                found.error = f"the server did not answer: {answer.request.error}"
                return
        fastest = [each.first_token_s / each.prompt_tokens for each in found.single if each.first_token_s]
        self._client.least_s_per_token = min(fastest, default=0.0)
        if all(each.error for each in found.single):
            found.error = f"no answer could be counted: {found.single[0].error}"

    async def _closed(self, slots: int) -> tuple[LoadPoint, bool]:
        await closed(self._ask, self._fresh([WAKE_TOKENS] * slots), slots)
        try:
            return await closed(self._ask, self._drawn(max(self._wish.requests, 2 * slots)), slots)
        except Cut as cut:
            self._keep(cut.point, False)
            raise

    async def _opened(self, rate: float) -> tuple[LoadPoint, bool]:
        wish = self._wish
        warmup = round(WARMUP * wish.requests)
        wanted, seed = self._drawn(warmup + wish.requests), self._chance.randrange(2**32)
        try:
            return await opened(self._ask, wanted, rate, wish.arrivals == "poisson", warmup, seed)
        except Cut as cut:
            self._keep(cut.point, False)
            raise

    def _keep(self, point: LoadPoint, gone: bool) -> None:
        found = self._found
        if not point.requests:
            return
        found.serving = replace(found.serving, points=[*found.serving.points, point])
        if gone:
            found.error = f"the server is gone since {point.name}: {point.requests[-1].error}"

    async def _search(self, progress: Progress) -> None:
        """Begin where one slot's requests would come one after the other."""
        wish, found = self._wish, self._found
        spans = [each.end_s for each in found.single if not each.error]
        search = largest_rate(len(spans) / sum(spans))
        rate = next(search)
        for done in range(10**6):
            progress(done, max(30, done + 1), f"{rate:.3g} requests a second")
            point, gone = await self._opened(rate)
            if gone:
                self._keep(point, gone)
                return
            try:
                rate = search.send((loads.kept(point.counted, wish.limits), len(point.counted)))
            except StopIteration as end:
                low, high, trials = end.value
                break
        ends = [low, min(high, 1e18)]
        found.serving = replace(found.serving, largest_rate=ends, largest_rate_trials=[tuple(each) for each in trials])
