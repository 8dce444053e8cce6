"""What is timed, with a clock that the test turns: a fake engine that says how long each of its steps took."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.records import Speed, Workload
from workbench.report import speeds
from workbench.worker.measure import bandwidth, timing
from workbench.worker.measure.energy import Meter

PREFILL_S, STEP_S = 0.001, 0.02


class Engine:
    """Takes a millisecond a prompt token and 20 a step, a little more or less, of its own clock.

    `slower`: a factor. `warming`: so many times as long in its first run. `noise`: of a logarithm, by Gauss.
    """

    continuous = True

    def __init__(self, slower: float = 1.0, noise: float = 0.01, seed: int = 0, warming: float = 1.0) -> None:
        self.time_s, self.runs = 0.0, 0
        self.asked: list[list[list[int]]] = []
        self.ready: list[tuple[int, int]] = []
        self._slower, self._noise, self._warming = slower, noise, warming
        self._chance = random.Random(seed)

    def clock(self) -> float:
        return self.time_s

    def prepare(self, batch: int, tokens: int) -> None:
        self.ready.append((batch, tokens))
        self.time_s += 100  # Whatever it takes, it is no part of a measurement.

    def _pass(self, seconds: float) -> None:
        first = self._warming if self.runs == 1 else 1.0
        # A run has its own speed, as a machine has: steps of one run are not independent.
        self.time_s += seconds * self._slower * first * self._speed

    def _begin(self) -> None:
        self.runs += 1
        self._speed = pow(2.718281828, self._chance.gauss(0, self._noise))

    def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        self.asked.append(prompts)
        self._begin()
        self._pass(PREFILL_S * sum(map(len, prompts)))
        yield [1] * len(prompts)
        for _ in range(new_tokens - 1):
            self._pass(STEP_S)
            yield [1] * len(prompts)

    def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
        self._begin()
        waiting, running = list(new_tokens), []  # type: list[int], list[int]
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            self._pass(STEP_S)
            yield len(running)
            running = [left - 1 for left in running if left > 1]


def decode_rates(engine: Engine, repeats: int = 5, new_tokens: int = 8) -> list[float]:
    load = Workload(prompt_tokens=[16], new_tokens=new_tokens, repeats=repeats)
    speed = timing.speeds(engine, load, [], clock=engine.clock)[0][0]
    return [len(steps) / sum(steps) for steps in speed.step_s]


def apart(one: list[float], two: list[float]) -> bool:
    a, b = speeds.interval(one), speeds.interval(two)
    assert a and b
    return a[1] < b[0] or b[1] < a[0]


@pytest.mark.parametrize("repeats", [3, 5, 8])
def test_a_tenth_slower_is_found_and_equals_are_not(repeats: int) -> None:
    """At a noise of one percent between repeats; an interval of three repeats is wide, and finds fewer."""
    pairs = 300
    equal = sum(
        apart(decode_rates(Engine(seed=s), repeats), decode_rates(Engine(seed=-s - 1), repeats)) for s in range(pairs)
    )
    slower = sum(
        apart(decode_rates(Engine(seed=s), repeats), decode_rates(Engine(1.1, seed=-s - 1), repeats))
        for s in range(pairs)
    )
    assert equal <= 0.05 * pairs
    assert slower >= (0.85 if repeats == 3 else 0.99) * pairs


@pytest.mark.parametrize("repeats", [3, 5, 8, 12])
def test_an_interval_holds_the_truth_in_95_of_100_cases(repeats: int) -> None:
    """2,000 draws: 95 % and no less than chance allows (three standard errors are 1.5 %)."""
    held = 0
    for seed in range(2000):
        low, high = speeds.interval(decode_rates(Engine(noise=0.05, seed=seed), repeats, new_tokens=2)) or (0, 0)
        held += low <= 1 / STEP_S <= high
    assert held >= 0.935 * 2000
    if repeats < 6:
        assert held <= 0.965 * 2000  # and no wider than it must be


def test_every_point_is_timed_after_a_warm_up_of_its_own() -> None:
    engine = Engine(noise=0.0, warming=50.0)
    load = Workload(prompt_tokens=[100, 10], batches=[1, 3], new_tokens=5, repeats=2)
    found, probes = timing.speeds(engine, load, [], clock=engine.clock, probe=lambda: 0.25)
    assert [(s.prompt_tokens, s.batch) for s in found] == [(100, 1), (10, 1), (100, 3)]
    assert engine.ready == [(1, 104), (1, 14), (3, 104)]
    for speed in found:
        assert speed.first_token_s == pytest.approx([PREFILL_S * speed.prompt_tokens * speed.batch] * 2)
        assert speed.step_s == [pytest.approx([STEP_S] * 4)] * 2
        assert speed.step_tokens == [[speed.batch] * 4] * 2
        assert speed.energy_j == [None, None]
    assert engine.runs == 3 * 3 and probes == [0.25] * 6


def test_prompts_are_fresh_in_every_repeat_and_the_same_for_every_engine() -> None:
    load, text = Workload(prompt_tokens=[32], batches=[2], new_tokens=2, repeats=4), list(range(5000))
    one, two, other = Engine(seed=1), Engine(seed=2), Engine()
    timing.speeds(one, load, text, clock=one.clock)
    timing.speeds(two, load, text, clock=two.clock)
    assert one.asked == two.asked
    seen = [tuple(ids) for batch in one.asked for ids in batch]
    assert len(seen) == len(set(seen)) == 10 and all(len(ids) == 32 for ids in seen)
    timing.speeds(
        other, Workload(prompt_tokens=[32], batches=[2], new_tokens=2, repeats=4, seed=1), text, clock=other.clock
    )
    assert not set(seen) & {tuple(ids) for batch in other.asked for ids in batch}


@pytest.mark.parametrize(
    ("repeats", "rounds", "sizes"),
    [(3, 3, [1, 1, 1]), (2, 3, [1, 1]), (1, 3, [1]), (20, 3, [6, 7, 7]), (5, 1, [5]), (4, 2, [2, 2])],
)
def test_a_round_has_its_share_of_the_repeats(repeats: int, rounds: int, sizes: list[int]) -> None:
    shares = timing.shares(repeats, rounds)
    assert [len(share) for share in shares] == sizes
    assert [repeat for share in shares for repeat in share] == list(range(repeats))


def test_rounds_time_the_same_prompts_as_one_go() -> None:
    load = Workload(prompt_tokens=[100], batches=[1, 3], new_tokens=5, repeats=3, requests=2)
    one, three = Engine(noise=0.0, warming=50.0), Engine(noise=0.0, warming=50.0)
    whole = timing.speeds(one, load, [], clock=one.clock)[0]
    parts = [timing.speeds(three, load, [], clock=three.clock, share=share)[0] for share in timing.shares(3, 3)]
    joined = timing.joined(parts)
    assert [speed.rounds for speed in joined] == [[1, 1, 1]] * 2 and [speed.rounds for speed in whole] == [[3]] * 2
    for mine, theirs in zip(joined, whole, strict=True):
        assert mine.first_token_s == pytest.approx(theirs.first_token_s)
        assert mine.step_tokens == theirs.step_tokens and mine.energy_j == theirs.energy_j
    # What is timed is the same; a later round is woken by the beginning of a prompt, so that no clock sees the first.
    long = [[ids for ids in batch if len(ids) == 100] for engine in (one, three) for batch in engine.asked]
    timed = {tuple(ids) for batch in long for ids in batch}
    assert len(timed) == 4 * (1 + 3)
    assert {len(ids) for batch in three.asked for ids in batch} == {100, timing.WAKE_TOKENS}
    served = timing.joined([timing.served(three, load, [], clock=three.clock, share=s) for s in timing.shares(3, 3)])
    again = timing.served(one, load, [], clock=one.clock)
    assert [each.rounds for each in served] == [[1, 1, 1]] * 2
    for mine, theirs in zip(served, again, strict=True):
        assert mine.seconds == pytest.approx(theirs.seconds) and mine.new_tokens == theirs.new_tokens


def test_throughput_counts_every_token_of_every_request() -> None:
    engine = Engine(noise=0.0)
    load = Workload(prompt_tokens=[4], new_tokens=8, batches=[1, 4], requests=3, repeats=2)
    one, four = timing.served(engine, load, [], clock=engine.clock)
    assert (one.slots, len(one.new_tokens)) == (1, 3) and (four.slots, len(four.new_tokens)) == (4, 12)
    assert all(4 <= length <= 12 for length in four.new_tokens) and len(set(four.new_tokens)) > 2
    assert one.seconds == pytest.approx([STEP_S * sum(one.new_tokens)] * 2)
    # Four slots that are filled as they fall free: no worse than the longest chain that a list scheduler makes.
    ideal = sum(four.new_tokens) / 4
    assert all(ideal <= each / STEP_S <= ideal + max(four.new_tokens) for each in four.seconds)
    assert timing.served(engine, Workload(), []) == []


def test_an_engine_that_loses_tokens_is_refused() -> None:
    class Forgetful(Engine):
        def serve(self, prompts: list[list[int]], new_tokens: list[int], slots: int) -> Iterator[int]:
            yield 1

        def generate(self, prompts: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
            yield [1, 0]

    with pytest.raises(UserError, match="the engine made 1 of"):
        timing.served(Forgetful(), Workload(requests=2), [])
    with pytest.raises(UserError, match="before every sequence had its first token"):
        timing.run(Forgetful(), [[1], [2]], 4)


def test_what_the_profiler_does_between_two_steps_is_next_to_nothing() -> None:
    """Counted, not timed: bytecodes and reads of the clock a step. benchmarks/profiler_overhead.py times them."""
    codes, reads = [0], [0]

    def clock() -> float:
        reads[0] += 1
        return float(reads[0])

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not timing.run.__code__:
            return None
        frame.f_trace_opcodes = True
        codes[0] += event == "opcode"
        return trace

    def of_steps(steps: int) -> tuple[int, int]:
        codes[0] = reads[0] = 0
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            timing.run(Engine(), [[1]], steps, clock)
        finally:
            sys.settrace(before)
        return codes[0], reads[0]

    (few_codes, few_reads), (many_codes, many_reads) = of_steps(100), of_steps(300)
    assert few_codes > 1000 and many_reads - few_reads == 200
    assert (many_codes - few_codes) / 200 < 60


def test_the_probe_is_the_quickest_of_three() -> None:
    moments = iter([0.0, 0.4, 1.0, 1.3, 2.0, 2.6])
    assert timing.work_probe(lambda: next(moments)) == pytest.approx(0.3)
    assert timing.work_probe() > 0


def test_copy_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.count(step=0.25)
    monkeypatch.setattr(bandwidth, "now", lambda: next(moments))
    found = bandwidth.copy_bandwidth({"threads": 2, "device": "cpu"}, lambda *_: None)
    assert found == {"bytes_per_s": 2 * 2 * bandwidth.COPY_BYTES / 0.25}


def test_joules_are_the_counters_difference_through_their_wrap(tmp_path) -> None:  # type: ignore[no-untyped-def]
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "max_energy_range_uj").write_text("1000000000\n")
    (zone / "energy_uj").write_text("999000000\n")
    (zone / "name").write_text("package-0\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of the package, which would be counted twice
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("5\n")
    meter = Meter(tmp_path, count_gpus=False)
    before = meter.read()
    (zone / "energy_uj").write_text("2000000\n")
    assert meter.counted == ["processor package-0"] and meter.since(before) == pytest.approx(3.0)
    nothing = Meter(tmp_path / "absent", count_gpus=False)
    assert not nothing.counted and nothing.read() is None and nothing.since(None) is None


def test_a_row_of_the_first_version_still_reads() -> None:
    from workbench.records import from_json
    from workbench.report.migrate import from_schema_1

    old = {
        "prompt_tokens": 5,
        "new_tokens": 2,
        "batch": 1,
        "first_token_s": [1.0],
        "step_s": [[1.0]],
        "step_tokens": [[1]],
    }
    assert from_json(Speed, old).energy_j == []
    row = from_schema_1({"workload": b'{"prompt_tokens": 5}', "measurement": b"null"})
    assert from_json(Workload, json.loads(row["workload"])).points == [(5, 1)]
