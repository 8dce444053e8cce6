"""Interleaved rounds: which repeat comes after which, who holds what, and what is left when something goes wrong."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.profile import rounds
from workbench.profile.rounds import APART_S, Interleaved, Rounds


class Bench:
    """Jobs whose rounds are noted, by a clock that they turn."""

    def __init__(self, round_s: float) -> None:
        self.time_s, self.seen, self.stored = 0.0, list[str](), list[str]()
        self.when: dict[str, list[float]] = {}
        self._round_s = round_s

    def interleaved(self) -> Interleaved:
        return Interleaved(self._store, lambda: self.time_s)

    def _store(self, row: Any) -> None:
        self.stored.append(row)
        self.seen.append(f"{row} stored")

    def job(self, name: str, rounds: int = 3) -> Rounds:
        try:
            for round_ in range(rounds):
                if round_:
                    yield
                self.when.setdefault(name, []).append(self.time_s)
                self.time_s += self._round_s
                self.seen.append(f"{name}{round_ + 1}")
        except GeneratorExit:
            self.seen.append(f"{name} ended")
            raise
        return name  # type: ignore[return-value]

    def locks(self, name: str) -> contextlib.ExitStack:
        held = contextlib.ExitStack()
        held.callback(self.seen.append, f"{name} free")
        return held


def test_the_repeats_of_a_job_lie_between_those_of_others() -> None:
    bench = Bench(round_s=APART_S / 2)
    with bench.interleaved() as jobs:
        for name in "abcd":
            jobs.start(bench.job(name), contextlib.ExitStack())
        order = [each for each in bench.seen if "stored" not in each]
        assert order == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "b3", "c3", "d1"]
        assert bench.stored == ["a", "b", "c"], "a row is there as soon as its job ends"
        jobs.finish()
    assert bench.stored == ["a", "b", "c", "d"]


@pytest.mark.parametrize("round_s", [0.2, 2.0, 10.0, 45.0])
def test_rounds_of_a_job_are_apart_however_long_they_take(round_s: float) -> None:
    bench, many = Bench(round_s), 60
    with bench.interleaved() as jobs:
        for job in range(many):
            jobs.start(bench.job(f"job {job}"), contextlib.ExitStack())
        begun_s = bench.time_s
        jobs.finish()
    early = [moments for moments in bench.when.values() if moments[2] < begun_s]
    assert len(bench.stored) == many and (early or round_s < 1)
    for one, two, three in early:
        assert two - one >= APART_S and three - two >= APART_S


def test_a_job_of_one_round_waits_for_nobody() -> None:
    bench = Bench(1.0)
    with bench.interleaved() as jobs:
        jobs.start(bench.job("a", rounds=1), bench.locks("a"))
        assert bench.seen == ["a1", "a stored", "a free"]


def test_locks_are_held_until_the_row_is_stored() -> None:
    bench = Bench(APART_S)
    with bench.interleaved() as jobs:
        jobs.start(bench.job("a", rounds=2), bench.locks("a"))
        jobs.start(bench.job("b", rounds=1), bench.locks("b"))
    assert bench.seen == ["a1", "b1", "b stored", "b free", "a2", "a stored", "a free"]


def test_whatever_goes_wrong_every_job_is_ended_and_what_ended_is_kept() -> None:
    bench = Bench(APART_S)

    def interrupted() -> Rounds:
        yield
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), bench.interleaved() as jobs:
        jobs.start(bench.job("a", rounds=2), bench.locks("a"))
        jobs.start(interrupted(), bench.locks("b"))
        jobs.start(bench.job("c"), bench.locks("c"))
    assert bench.stored == ["a"]
    assert sorted(bench.seen) == ["a free", "a stored", "a1", "a2", "b free", "c ended", "c free", "c1"]


@pytest.mark.parametrize(("cuda", "available_gib", "room"), [(False, 24, True), (False, 5, False), (True, 1000, False)])
def test_a_job_is_loaded_beside_others_only_where_there_is_room(
    cuda: bool, available_gib: int, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A billion parameters, 3.7 GiB in float32."""
    monkeypatch.setattr(rounds, "uses_gpu", lambda backend: cuda)
    monkeypatch.setattr(rounds.psutil, "virtual_memory", lambda: SimpleNamespace(available=available_gib << 30))
    row: Any = SimpleNamespace(backend="llamacpp", artifact=SimpleNamespace(parameters=10**9))
    assert rounds.room_beside(row) is room
