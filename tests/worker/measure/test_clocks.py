"""What is timed to the last digit: prompts by their seed, shares of turns, warm-ups, lengths that are served."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.records import Served, Speed, Workload
from workbench.worker.measure import bandwidth, energy, timing
from workbench.worker.measure.energy import Meter

TEXT = list(range(1000, 1600))


class Counting:
    """An engine whose clock gains a second a step, a quarter a serving step, and remembers what it was asked."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.asked: list[tuple[list[list[int]], int]] = []
        self.served: list[tuple[list[list[int]], list[int], int]] = []
        self.ready: list[tuple[int, int]] = []

    def clock(self) -> float:
        return self.time_s

    def prepare(self, batch: int, tokens: int) -> None:
        self.ready.append((batch, tokens))

    def generate(self, batch: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
        self.asked.append((batch, new_tokens))
        for _ in range(new_tokens):
            self.time_s += 1.0
            yield [1] * len(batch)

    def serve(self, batch: list[list[int]], lengths: list[int], slots: int) -> Iterator[int]:
        self.served.append((batch, lengths, slots))
        for length in lengths:
            self.time_s += 0.25
            yield length


def digest(found: object) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def test_prompts_are_the_same_as_ever() -> None:
    """Stored results: speeds of other prompts would not be those of rows that were measured before."""
    load = Workload(prompt_tokens=[8], seed=7)
    found = timing.prompts(load, TEXT, 8, 2, 3, 5)
    assert digest(found) == "3238713e1301"
    chance = random.Random(7 * 1000003 + 5)
    starts = [[chance.randrange(592) for _ in range(2)] for _ in range(3)]
    assert found == [[TEXT[start : start + 8] for start in row] for row in starts]
    assert timing.prompts(load, TEXT, 8, 2, 3, 6) != found != timing.prompts(Workload(seed=8), TEXT, 8, 2, 3, 5)


def test_a_short_text_is_repeated_until_two_prompts_fit_and_without_any_ids_are_drawn() -> None:
    load = Workload(seed=1)
    found = timing.prompts(load, [1, 2, 3], 5, 1, 50, 0)
    assert {len(row[0]) for row in found} == {5}
    assert {tuple(row[0]) for row in found} == {(1, 2, 3, 1, 2), (2, 3, 1, 2, 3), (3, 1, 2, 3, 1)}
    assert {tuple(row[0]) for row in timing.prompts(load, [1, 2], 1, 1, 50, 0)} == {(1,)}
    drawn = timing.prompts(load, [], 400, 1, 3, 0)
    assert digest(drawn) == digest(timing.prompts(load, [5], 400, 1, 3, 0)) == "5113aaf780a5"
    ids = {one for row in drawn for one in row[0]}
    assert min(ids) >= 10 and max(ids) < 250 and len(ids) > 200


def test_a_warm_up_is_whole_in_the_first_turn_and_short_in_later_ones() -> None:
    load = Workload(prompt_tokens=[100, 20], batches=[2], new_tokens=12, repeats=5, warmup=2)
    whole, later = Counting(), Counting()
    found, probes = timing.speeds(whole, load, TEXT, clock=whole.clock, probe=lambda: 0.5)
    part, _ = timing.speeds(later, load, TEXT, clock=later.clock, share=range(2, 4))
    assert probes == [0.5] * 10 and timing.speeds(Counting(), load, TEXT)[1] == []
    assert [(len(batch[0]), new) for batch, new in whole.asked] == [
        *[(100, 8)] * 2, *[(100, 12)] * 5, *[(20, 8)] * 2, *[(20, 12)] * 5
    ]  # fmt: skip
    assert [(len(batch[0]), new) for batch, new in later.asked] == [
        *[(timing.WAKE_TOKENS, 2)] * 2, *[(100, 12)] * 2, *[(20, 2)] * 2, *[(20, 12)] * 2
    ]  # fmt: skip
    assert timing.WAKE_TOKENS == 64 and timing.WARMUP_NEW_TOKENS == 8
    assert later.asked[2:4] == whole.asked[4:6], "the third and fourth repeat have the prompts that are theirs"
    assert later.asked[0][0] == [ids[:64] for ids in whole.asked[0][0]]
    assert whole.ready == [(2, 111), (2, 31)]
    assert [speed.rounds for speed in found] == [[5], [5]] and [speed.rounds for speed in part] == [[2], [2]]
    assert found[0] == Speed(100, 12, 2, [1.0] * 5, [[1.0] * 11] * 5, [[2] * 11] * 5, [None] * 5, [5])
    one = Workload(prompt_tokens=[4], new_tokens=1, repeats=1, warmup=1)
    single = Counting()
    timing.speeds(single, one, TEXT, clock=single.clock)
    assert [new for _, new in single.asked] == [1, 1]
    woken = Counting()
    timing.speeds(woken, one, TEXT, clock=woken.clock, share=range(1, 1))
    assert [new for _, new in woken.asked] == [1]


def test_every_repeat_is_told_and_its_joules_are_its_own() -> None:
    class Counter:
        spent = 0.0

        def read(self) -> list[float]:
            Counter.spent += 3
            return [self.spent]

        def since(self, before: list[float]) -> float:
            return self.spent + 2 - before[0]

    engine, steps = Counting(), []
    load = Workload(prompt_tokens=[4], new_tokens=3, repeats=3, requests=1)
    meter: Any = Counter()
    (speed,), _ = timing.speeds(engine, load, TEXT, lambda *_: steps.append(1), engine.clock, meter)
    assert speed.energy_j == [2.0] * 3 and len(steps) == 3
    timing.served(engine, load, TEXT, lambda *_: steps.append(1), engine.clock)
    assert len(steps) == 6


@pytest.mark.parametrize("repeats", range(1, 12))
def test_shares_are_as_even_as_can_be(repeats: int) -> None:
    for rounds in range(0, 14):
        found = timing.shares(repeats, rounds)
        assert len(found) == max(1, min(rounds, repeats))
        assert [repeat for share in found for repeat in share] == list(range(repeats))
        assert max(map(len, found)) - min(map(len, found)) <= 1 and min(map(len, found)) >= 1


def test_the_first_token_is_that_of_the_slowest_sequence() -> None:
    class Uneven:
        def generate(self, batch: list[list[int]], new_tokens: int) -> Iterator[list[int]]:
            yield from ([0, 1, 0], [2, 0, 0], [0, 0, 1], [1, 2, 0], [0, 0, 1])

    moments = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0])
    first_s, step_s, step_tokens = timing.run(Uneven(), [[1], [2], [3]], 4, lambda: next(moments))
    assert (first_s, step_s, step_tokens) == (6.0, [4.0, 5.0], [3, 1])


def test_what_is_served_is_drawn_once_for_every_engine() -> None:
    load = Workload(prompt_tokens=[30, 7], new_tokens=9, batches=[2, 3], requests=4, repeats=3, seed=11)
    engine, later = Counting(), Counting()
    found = timing.served(engine, load, TEXT, clock=engine.clock)
    timing.served(later, load, TEXT, clock=later.clock, share=range(1, 2))
    chance = random.Random(12)
    lengths = [[chance.randint(4, 13) for _ in range(slots * 4)] for slots in (2, 3)]
    assert [each.new_tokens for each in found] == lengths
    assert found[1] == Served(3, 30, lengths[1], [0.25 * 12] * 3, False, [3])
    assert engine.ready == [(2, 30 + 12), (3, 30 + 12)]
    # A warm-up of as many prompts as there are slots, two tokens each; then every repeat with all of them.
    assert [(len(batch), each, slots) for batch, each, slots in engine.served[:2]] == [
        (2, [2, 2], 2),
        (8, lengths[0], 2),
    ]
    fresh = timing.prompts(load, TEXT, 30, 8, 4, 1000)
    assert [batch for batch, _, _ in engine.served[:4]] == [fresh[0][:2], *fresh[1:]]
    assert engine.served[4][0] == timing.prompts(load, TEXT, 30, 12, 4, 1001)[0][:3]
    assert [batch for batch, _, _ in later.served[:2]] == [fresh[0][:2], fresh[2]]
    whole = Counting()
    timing.served(whole, load, TEXT, clock=whole.clock, whole=True)
    assert [whole.served[0], whole.served[4]] == [
        (batch, sorted(each, reverse=True)[:slots], slots)
        for (batch, _, slots), each in zip(engine.served[::4], lengths, strict=True)
    ]
    assert max(lengths[1][:3]) < max(lengths[1]), "of this draw the longest answer is none of the first"
    assert [each for n, each in enumerate(whole.served) if n % 4] == [
        each for n, each in enumerate(engine.served) if n % 4
    ]
    short = Counting()
    (one,) = timing.served(short, Workload(new_tokens=1, prompt_tokens=[3], batches=[1], requests=2, repeats=1), TEXT)
    assert one.new_tokens == [1, 1]


def test_turns_are_joined_sample_by_sample() -> None:
    parts = [
        [Speed(4, 2, 1, [float(turn)], [[turn + 0.5]], [[1]], [turn + 0.1], [1])] for turn in range(2)
    ]  # fmt: skip
    assert timing.joined(parts) == [Speed(4, 2, 1, [0.0, 1.0], [[0.5], [1.5]], [[1], [1]], [0.1, 1.1], [1, 1])]
    served = [[Served(2, 4, [5], [float(turn)], True, [1])] for turn in range(2)]
    assert timing.joined(served) == [Served(2, 4, [5], [0.0, 1.0], True, [1, 1])]
    with pytest.raises(ValueError):
        timing.joined([parts[0], []])


def test_the_probe_is_three_times_four_mebibytes_of_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    class Counted:
        def update(self, block: bytes) -> None:
            hashed.append(len(block))

    monkeypatch.setattr(timing.hashlib, "sha256", Counted)
    moments = iter(range(6))
    assert timing.work_probe(lambda: float(next(moments))) == 1.0
    assert hashed == [1 << 16] * (3 * (4 << 20) // (1 << 16))


def zone(folder: Path, name: str, microjoules: int, most: int) -> Path:
    (folder / name).mkdir()
    (folder / name / "name").write_text("package-0\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    return folder / name / "energy_uj"


def test_joules_are_summed_over_packages_each_with_a_wrap_of_its_own(tmp_path: Path) -> None:
    files = [zone(tmp_path, f"intel-rapl:{n}", 900_000_000, most) for n, most in enumerate((10**9, 2 * 10**9))]
    (tmp_path / "intel-rapl:2").mkdir()  # one that cannot be read
    meter = Meter(tmp_path, count_gpus=False)
    before = meter.read()
    assert before == [900.0, 900.0] and meter.since(before) == 0.0
    for file in files:
        file.write_text("850000000")
    assert meter.since(before) == pytest.approx(950 + 1950)
    files[0].unlink()
    assert meter.read() is None and meter.since(before) is None


def test_gpus_that_count_their_joules_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"a": 5.0, "b": None, "c": 7.0}
    monkeypatch.setattr(energy, "gpus", lambda: [SimpleNamespace(name=name) for name in spent])
    monkeypatch.setattr(energy, "joules", lambda gpu: spent[gpu.name])
    meter = Meter(tmp_path)
    before = meter.read()
    assert before == [5.0, 7.0] and meter.counted == ["a", "c"]
    spent["a"], spent["c"] = 6.5, 9.0
    assert meter.since(before) == pytest.approx(3.5)
    assert Meter(tmp_path, count_gpus=False).counted == []
    spent["a"] = None
    monkeypatch.setattr(energy, "joules", lambda gpu: None)
    assert meter.since(before) is None, "a driver that went away is no reason to lose a measurement"


def test_the_best_copy_of_several_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 0.25, 0.1 and 0.2 seconds: the third brings what was spent over 0.4."""
    monkeypatch.setattr(bandwidth, "COPY_BYTES", 1 << 12)
    moments = iter([0.0, 0.25, 1.0, 1.1, 2.0, 2.2, 3.0, 3.01])
    monkeypatch.setattr(bandwidth, "now", lambda: next(moments))
    seen: list[object] = []
    found = bandwidth.copy_bandwidth({"threads": 2, "device": "cpu"}, lambda *words: seen.append(words))
    assert found == {"bytes_per_s": pytest.approx(2 * (1 << 12) * 2 / 0.1)}
    assert seen == [(0, 1, "copy bandwidth")] and next(moments) == 3.0
    assert bandwidth.COPY_S == 0.4
