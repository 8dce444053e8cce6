"""Nights of a server whose clock is the test's own: what it takes longer is told, what it does not is not.

Requests, counting, rows, comparison and the night's judgement are the program's; only the wire is not there.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import workbench as wb
from tests.serving import virtual_clock
from workbench.console import Console
from workbench.profile import endpoint
from workbench.profile.under_load import Wish
from workbench.records import Request, Row
from workbench.report.verdicts.night import judge
from workbench.serving.address import Address, address_of
from workbench.serving.client import Answer, Dialect, Wanted
from workbench.serving.stream import Event, Usage

FIRST_S, TOKEN_S, NOISE = 0.2, 0.02, 0.03
WISH = Wish(prompt_tokens=60, new_tokens=16, concurrency=(4,), requests=40, limits={})
SLOWER = 1.15


class Clocked:
    """A client whose server takes so long for a prompt and for a token, within 3 %: by the loop's clock."""

    least_s_per_token = 0.0

    def __init__(self, address: Address, slower: float, seed: int) -> None:
        self.address, self._slower, self._chance = address, slower, random.Random(seed)

    async def __aenter__(self) -> Clocked:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get(self, path: str) -> bytes:
        return json.dumps({"data": [{"id": "toy"}]}).encode()

    async def complete(self, dialect: Dialect, prompt: str, new_tokens: int) -> Event:
        return Event("toy", [], Usage(3 + len(prompt) // 5, new_tokens))

    async def stream(self, dialect: Dialect, wanted: Wanted) -> Answer:
        took = [
            self._slower * s * self._chance.gauss(1, NOISE) for s in [FIRST_S, *[TOKEN_S] * (wanted.new_tokens - 1)]
        ]
        await asyncio.sleep(sum(took))
        first, *gaps = took
        request = Request(0, 0, 3 + len(wanted.prompt) // 5, sum(took), first, gaps, [1] * wanted.new_tokens)
        return Answer(request, "ids")


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A night's row, by day and by how much slower the server is."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))

    def measured(day: int, slower: float = 1.0) -> Row:
        monkeypatch.setattr(endpoint, "Client", lambda address: Clocked(address, slower, seed=day))
        monkeypatch.setattr(endpoint, "asyncio", SimpleNamespace(run=virtual_clock.run))
        row = endpoint.measure_endpoint(
            address_of("127.0.0.1:8000"), None, None, WISH, tmp_path / f"night{day}", Console(True)
        )
        assert row.error is None
        return replace(row, started_at=f"2026-11-{day:02}T03:00:00Z")

    return measured


def worse(old: Row, new: Row) -> set[str]:
    """Metrics that got worse, of those that compare judges."""
    (changes,) = wb.compare([old], [new]).changes.values()
    return {each.metric for each in changes if each.verdict == "worse"}


def test_two_nights_with_a_slowdown_of_15_per_cent_are_told_apart(night: Any) -> None:
    assert {"decode_tok_s", "prefill_tok_s"} <= worse(night(1), night(2, SLOWER))
    assert worse(night(1), night(3)) == set()
    assert worse(night(2, SLOWER), night(1)) == set()


def test_a_night_that_is_slower_is_an_alarm_and_a_night_like_others_is_none(night: Any) -> None:
    before = [night(day) for day in range(1, 8)]
    slow = [night(8, SLOWER)] * 3
    verdict = judge(before, slow, [])
    assert verdict.word == "regressed" and {"decode_tok_s", "prefill_tok_s"} <= {each.metric for each in verdict.alarms}
    assert judge(before, [night(9)] * 3, []).word == "good"
