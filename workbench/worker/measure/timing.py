"""Clocks: how long an engine takes for a workload's points, and how fast the machine is meanwhile.

`job.py` decides what is measured and in what order; this is the only file that looks at a clock. Everything
takes the clock as an argument, so that a test can turn it. A point is timed after a warm-up of its own, with
prompts that no cache has seen, and every repeat is kept.

Beside each repeat stands how long a fixed piece of work took just before it (`probe`): where clocks cannot be
read, as in most virtual machines, that is what shows a processor that throttles or is shared.

Rejected: timing inside the engines (each has its own idea of what counts), and one figure a run (nobody could tell
noise from a difference).
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workbench.errors import UserError
from workbench.records import Served, Speed, Workload, mixed_lengths
from workbench.worker.measure.energy import Meter

Clock = Callable[[], float]
WARMUP_NEW_TOKENS = 8
Told = Callable[[float, float], object]
"""Called after each repeat with when it began and ended."""
WAKE_TOKENS = 64
PROBE_BYTES = 4 << 20


def now() -> float:
    """Seconds of a clock that never goes back."""
    return time.perf_counter()


def prompts(
    workload: Workload, text: list[int], prompt_tokens: int, batch: int, rounds: int, salt: int
) -> list[list[list[int]]]:
    """Fresh prompts: [round][sequence][id], cut from `text` by the workload's seed and `salt` (the point)."""
    chance = random.Random(workload.seed * 1000003 + salt)
    if len(text) < 2:
        # No evaluation (a base without weights, say): any ids will do, small ones exist in every vocabulary.
        text = [chance.randrange(10, 250) for _ in range(4 * prompt_tokens)]
    while len(text) < 2 * prompt_tokens:
        text = text + text
    starts = [[chance.randrange(len(text) - prompt_tokens) for _ in range(batch)] for _ in range(rounds)]
    return [[text[s : s + prompt_tokens] for s in row] for row in starts]


def shares(repeats: int, rounds: int) -> list[range]:
    """The repeats of each round, as even as can be; no round is empty."""
    rounds = max(1, min(rounds, repeats))
    ends = [repeats * (i + 1) // rounds for i in range(rounds)]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def speeds(
    engine: Any,
    workload: Workload,
    text: list[int],
    stepped: Told = lambda began, ended: None,
    clock: Clock = now,
    meter: Meter | None = None,
    probe: Callable[[], float] | None = None,
    share: range | None = None,
    whole: bool = False,
) -> tuple[list[Speed], list[float]]:
    """Raw samples of every point, in the workload's order; and the probe's seconds before each repeat.

    Of all repeats, or of those in `share`. The first share is warmed up by whole prompts, a later one only woken:
    its kernels are chosen and its memory is there, its caches and clocks are not. `whole`: the first warm-up of a point
    is as long as a repeat, for a GPU, where a kernel is chosen or compiled when the cache first has some length.
    """
    share = range(workload.repeats) if share is None else share
    found, probes = [], []
    for salt, (prompt_tokens, batch) in enumerate(workload.points):
        _ready(engine, batch, prompt_tokens, workload.new_tokens)
        rounds = workload.warmup + workload.repeats
        fresh = prompts(workload, text, prompt_tokens, batch, rounds, salt)
        for number, each in enumerate(fresh[: workload.warmup]):
            if share.start == 0:
                most = workload.new_tokens if whole and number == 0 else WARMUP_NEW_TOKENS
                run(engine, each, min(workload.new_tokens, most), clock)
            else:
                run(engine, _woken(each), min(workload.new_tokens, 2), clock)
        samples, joules = [], []
        for each in (fresh[workload.warmup + repeat] for repeat in share):
            if probe is not None:
                probes.append(probe())
            before, began = meter.read() if meter else None, clock()
            samples.append(run(engine, each, workload.new_tokens, clock))
            joules.append(meter.since(before) if meter else None)
            stepped(began, began + samples[-1][0] + sum(samples[-1][1]))
        found.append(
            Speed(
                prompt_tokens=prompt_tokens,
                new_tokens=workload.new_tokens,
                batch=batch,
                first_token_s=[sample[0] for sample in samples],
                step_s=[sample[1] for sample in samples],
                step_tokens=[sample[2] for sample in samples],
                energy_j=joules,
                rounds=[len(share)],
            )
        )
    return found, probes


def served(
    engine: Any,
    workload: Workload,
    text: list[int],
    stepped: Told = lambda began, ended: None,
    clock: Clock = now,
    share: range | None = None,
    whole: bool = False,
) -> list[Served]:
    """Throughput at every batch size: `requests` prompts a slot, answers of different lengths, one after the other.

    Lengths are drawn from half to one and a half of `new_tokens`, so that sequences end at different times and an
    engine that can must take the next ones in between. The same draw for every engine and repeat. `share` as in
    `speeds`. `whole`: the warm-up has the longest answers, so that the cache has had every length that is timed.
    """
    share = range(workload.repeats) if share is None else share
    found: list[Served] = []
    if not workload.requests:
        return found
    chance = random.Random(workload.seed + 1)
    prompt_tokens = workload.prompt_tokens[0]
    for salt, slots in enumerate(workload.batches):
        many = slots * workload.requests
        lengths = mixed_lengths(workload.new_tokens, many, chance)
        _ready(engine, slots, prompt_tokens, workload.longest_answer)
        fresh = prompts(workload, text, prompt_tokens, many, workload.repeats + 1, 1000 + salt)
        first = fresh[0][:slots]
        for _ in engine.serve(
            first if share.start == 0 else _woken(first), served_warmup(lengths, slots, share, whole), slots
        ):
            pass
        seconds = []
        for each in (fresh[1 + repeat] for repeat in share):
            started = clock()
            gained = sum(engine.serve(each, lengths, slots))
            ended = clock()
            seconds.append(ended - started)
            if gained != sum(lengths):
                raise UserError(f"the engine made {gained} of {sum(lengths)} tokens")
            stepped(started, ended)
        found.append(
            Served(
                slots=slots,
                prompt_tokens=prompt_tokens,
                new_tokens=lengths,
                seconds=seconds,
                continuous=bool(getattr(engine, "continuous", False)),
                rounds=[len(share)],
            )
        )
    return found


def served_warmup(lengths: list[int], slots: int, share: range, whole: bool) -> list[int]:
    """New tokens of each of `slots` prompts before the repeats of `share`; see `served`."""
    return sorted(lengths, reverse=True)[:slots] if whole and share.start == 0 else [2] * slots


def joined(parts: list[list[Any]]) -> list[Any]:
    """`Speed` or `Served` of every point from those of each round: the samples one after the other."""
    samples = ("first_token_s", "step_s", "step_tokens", "energy_j", "seconds", "rounds")
    found = []
    for each in zip(*parts, strict=True):
        lists = [name for name in samples if hasattr(each[0], name)]
        found.append(replace(each[0], **{name: [s for part in each for s in getattr(part, name)] for name in lists}))
    return found


def _woken(batch: list[list[int]]) -> list[list[int]]:
    return [ids[:WAKE_TOKENS] for ids in batch]


def run(
    engine: Any, batch: list[list[int]], new_tokens: int, clock: Clock = now
) -> tuple[float, list[float], list[int]]:
    """Seconds to the first token of all sequences, then seconds and tokens of each later step."""
    started = clock()
    waiting = len(batch)
    seen = [0] * len(batch)
    first_s = 0.0
    step_s: list[float] = []
    step_tokens: list[int] = []
    last = started
    for gained in engine.generate(batch, new_tokens):
        moment = clock()
        if waiting:
            seen = [a + b for a, b in zip(seen, gained, strict=True)]
            waiting = seen.count(0)
            first_s = moment - started
        else:
            step_s.append(moment - last)
            step_tokens.append(sum(gained))
        last = moment
    if waiting:
        raise UserError("the engine stopped before every sequence had its first token")
    return first_s, step_s, step_tokens


def work_probe(clock: Clock = now) -> float:
    """Seconds of a fixed piece of work on one core, a few milliseconds that stay in the core's own cache.

    The best of three: being interrupted once is not a slower clock.
    """
    block, took = bytes(1 << 16), []
    for _ in range(3):
        digest, started = hashlib.sha256(), clock()
        for _ in range(PROBE_BYTES >> 16):
            digest.update(block)
        took.append(clock() - started)
    return min(took)


def _ready(engine: Any, batch: int, prompt_tokens: int, new_tokens: int) -> None:
    """Let an engine that sizes itself by what comes do so before the clock runs. It is never fed its last token."""
    if hasattr(engine, "prepare"):
        engine.prepare(batch, prompt_tokens + new_tokens - 1)
