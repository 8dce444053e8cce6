"""A job in an engine's own server: timed as its user sees it, over HTTP.

The same prompts as in any engine's own process, as ids where the server takes them; one answer at a time for each
prompt length, then, for each number of sequences, requests of mixed lengths whose next begins when any ends. The
client's clock is what users have: with what HTTP, the queue and the sampler cost.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from workbench.records import Job, LoadPoint, Measurement, Request, Serving, Speed, faults_of, mixed_lengths
from workbench.worker import Progress
from workbench.worker.backends.served import Server
from workbench.worker.measure import timing

if TYPE_CHECKING:
    from workbench.serving.client import Wanted


def measure(job: Job, server: Server, text: list[int], load_s: float, progress: Any, whole: bool) -> Measurement:
    """What a server that is up does under the job's workload, with prompts cut from `text`; pauses between the job's
    rounds. `whole`: warm-ups as long as what is timed, as in `timing.py`."""
    rounds = []
    with asyncio.Runner() as runner:
        http = _OverHttp(job, server, text, progress, whole)
        runner.run(http.open())
        for share in timing.shares(job.workload.repeats, job.rounds):
            if share.start:
                progress.pause()
            rounds.append(runner.run(http.round(share)))
        runner.run(http.close())
    settings, points = server.settings(), [point for _, points in rounds for point in points]
    return Measurement(
        device=str(settings.pop("device")),
        load_s=load_s,
        speeds=timing.joined([speeds for speeds, _ in rounds]),
        settings=settings,
        warnings=faults_of(points),
        conditions={"probe_s": http.probes, "repeats_s": http.repeats_s},
        serving=Serving(points),
    )


class _OverHttp:
    """One server and the clock before each repeat."""

    def __init__(self, job: Job, server: Server, text: list[int], progress: Progress, whole: bool) -> None:
        from workbench.serving.address import address_of
        from workbench.serving.client import Client, Dialect

        self._job, self._server, self._text, self._progress, self._whole = job, server, text, progress, whole
        self._client, self._dialect = (
            Client(address_of(server.url)),
            Dialect(server.name, server.name, by_length=server.BY_LENGTH),
        )
        load = job.workload
        self._steps = (len(load.prompt_tokens) + len(load.batches) * bool(load.requests)) * load.repeats
        self._done = self._asked = 0
        self.probes: list[float] = []
        self.repeats_s: list[list[float]] = []

    async def open(self) -> None:
        await self._client.__aenter__()

    async def close(self) -> None:
        await self._client.__aexit__()

    async def round(self, share: range) -> tuple[list[Speed], list[LoadPoint]]:
        """The repeats of `share`, of every point."""
        load = self._job.workload
        speeds = [await self._alone(salt, tokens, share) for salt, tokens in enumerate(load.prompt_tokens)]
        if not load.requests:
            return speeds, []
        chance, points = random.Random(load.seed + 1), []
        for salt, slots in enumerate(load.batches):
            lengths = mixed_lengths(load.new_tokens, slots * load.requests, chance)
            points += await self._together(salt, slots, lengths, share)
        return speeds, points

    def _fresh(self, tokens: int, batch: int, rounds: int, salt: int) -> list[list[list[int]]]:
        """Prompts as any engine gets them, but for two ids: no two begin alike, or a server would remember."""
        found = timing.prompts(self._job.workload, self._text, tokens, batch, rounds, salt)
        return [[self._unlike(ids) for ids in each] for each in found]

    def _unlike(self, ids: list[int]) -> list[int]:
        self._asked += 1
        # Ids that every vocabulary has.
        return [10 + self._asked % 240, 10 + self._asked // 240 % 240, *ids[2:]][: len(ids)]

    def _warming(self, ids: list[int], share: range) -> list[int]:
        """A prompt that warms the server up: whole at first, a few tokens later."""
        return self._unlike(ids if share.start == 0 else ids[: timing.WAKE_TOKENS])

    async def _alone(self, salt: int, tokens: int, share: range) -> Speed:
        load = self._job.workload
        fresh = self._fresh(tokens, 1, load.warmup + load.repeats, salt)
        for number, (ids,) in enumerate(fresh[: load.warmup]):
            whole = self._whole and number == share.start == 0
            new_tokens = load.new_tokens if whole else timing.WARMUP_NEW_TOKENS
            await self._ask(self._wanted(self._warming(ids, share), new_tokens))
        found = []
        for (ids,) in (fresh[load.warmup + repeat] for repeat in share):
            wanted = self._wanted(ids, load.new_tokens)
            self.probes.append(timing.work_probe())
            began = timing.now()
            found.append(await self._ask(wanted))
            self._stepped(began)
        return Speed(
            prompt_tokens=tokens,
            new_tokens=load.new_tokens,
            batch=1,
            first_token_s=[each.first_token_s or 0.0 for each in found],
            step_s=[each.steps_s for each in found],
            step_tokens=[each.gained[1:] for each in found],
            rounds=[len(share)],
        )

    async def _together(self, salt: int, slots: int, lengths: list[int], share: range) -> list[LoadPoint]:
        from workbench.serving.load import closed

        load = self._job.workload
        tokens = load.prompt_tokens[0]
        fresh = self._fresh(tokens, len(lengths), load.repeats + 1, 1000 + salt)

        def wanted(batch: list[list[int]], answers: list[int]) -> list[Wanted]:
            return [self._wanted(ids, answer) for ids, answer in zip(batch, answers, strict=True)]

        def ask(each: Wanted) -> Any:
            return self._client.stream(self._dialect, each)

        answers = timing.served_warmup(lengths, slots, share, self._whole)
        await closed(ask, wanted([self._warming(ids, share) for ids in fresh[0][:slots]], answers), slots)
        points = []
        for batch in (fresh[1 + repeat] for repeat in share):
            requests = wanted(batch, lengths)
            began = timing.now()
            point, gone = await closed(ask, requests, slots)
            if gone:
                self._server.check()
                raise RuntimeError(f"the server answers no more: {point.requests[-1].error}")
            points.append(point)
            self._stepped(began)
        return points

    def _wanted(self, ids: list[int], new_tokens: int) -> Wanted:
        from workbench.serving.client import Wanted

        return Wanted(*self._server.prompt(ids), new_tokens)

    async def _ask(self, wanted: Wanted) -> Request:
        answer = await self._client.stream(self._dialect, wanted)
        if answer.request.error:
            self._server.check()
            told = f"no answer of {wanted.new_tokens} tokens to {wanted.prompt_tokens}"
            raise RuntimeError(f"{told}: {answer.request.error}")
        return answer.request

    def _stepped(self, began: float) -> None:
        self._done += 1
        self.repeats_s.append([began, timing.now()])
        self._progress(self._done, self._steps, "over HTTP")
