"""With what a server is warmed up before it is timed."""

from __future__ import annotations

import random

import pytest

from workbench.records import Artifact, Job, Request, Workload, mixed_lengths
from workbench.serving import client
from workbench.worker.measure import over_http

NEW, REQUESTS, PAUSE = 12, 4, (0, 0)


class Client:
    """Answers at once, and notes what it was asked."""

    asked: list[tuple[int, int]]

    def __init__(self, address: object) -> None:
        Client.asked = []

    async def __aenter__(self) -> None: ...

    async def __aexit__(self) -> None: ...

    async def stream(self, dialect: object, wanted: client.Wanted) -> client.Answer:
        self.asked.append((wanted.prompt_tokens, wanted.new_tokens))
        gained = [1] * wanted.new_tokens
        request = Request(0.0, 0.0, wanted.prompt_tokens, 1.0, 0.5, [0.01] * (wanted.new_tokens - 1), gained)
        return client.Answer(request, None)


class Server:
    BY_LENGTH, name, url = False, "m", "http://127.0.0.1:1/v1"

    def settings(self) -> dict[str, object]:
        return {"device": "cuda"}

    def prompt(self, ids: list[int]) -> tuple[list[int], int]:
        return ids, len(ids)


class Progress:
    def __call__(self, *_: object) -> None: ...

    def pause(self) -> None:
        Client.asked.append(PAUSE)


@pytest.mark.parametrize("whole", [False, True])
def test_on_a_gpu_a_warm_up_has_every_length_that_is_timed(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "Client", Client)
    load = Workload(prompt_tokens=[70], new_tokens=NEW, batches=[1, 2], repeats=2, warmup=2, requests=REQUESTS, seed=3)
    job = Job("b", Artifact("v", "base", "gguf", "", "", 1, 1), "llama-server", {}, load, {}, rounds=2)
    over_http.measure(job, Server(), [], 0.0, Progress(), whole)  # type: ignore[arg-type]
    chance = random.Random(load.seed + 1)
    timed = [(slots, mixed_lengths(NEW, slots * REQUESTS, chance)) for slots in load.batches]
    pause = Client.asked.index(PAUSE)
    first, later = Client.asked[:pause], Client.asked[pause + 1 :]
    assert first[:3] == [(70, NEW if whole else 8), (70, 8), (70, NEW)]
    assert later[:3] == [(64, 8), (64, 8), (70, NEW)], "a later round is only woken"
    first, later = first[3:], later[3:]
    for slots, lengths in timed:
        assert max(lengths) > max(lengths[:slots]), "of this draw the longest answer is none of the first"
        longest = sorted(lengths)[-slots:]
        assert sorted(first[:slots]) == [(70, length) for length in (longest if whole else [2] * slots)]
        assert later[:slots] == [(64, 2)] * slots
        assert first[slots : slots + len(lengths)] == [(70, length) for length in lengths]
        first, later = first[slots + len(lengths) :], later[slots + len(lengths) :]
    assert first == later == []
