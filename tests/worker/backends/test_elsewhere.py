"""A server that somebody else started, scored by what it tells, or not at all and why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.serving.fake_server import fake_server
from workbench.records import Artifact, Evaluation, Job, Measurement, Task, Workload, from_json, to_json
from workbench.worker.backends import elsewhere
from workbench.worker.measure.job import score
from workbench.worker.tokens.file import TokenFile, write_tokens
from workbench.worker.tokens.spelling import as_spelt

TELLS = {2: ("the", -0.5), 3: (" cat", -0.5), 4: (" sat", -2.0), 5: (" down", -3.0)}
SPELLING: dict[str, str | None] = {"2": "the", "3": "Ġcat", "4": "Ġsat", "5": "Ġdown"}


def scored(folder: Path, url: str, api: str = "completions", **parts: Any) -> Measurement:
    """What the worker answers for two windows of a vocabulary of six."""
    file = folder / "tokens.json"
    spelling = parts.pop("spelling", SPELLING)
    write_tokens(file, TokenFile([[2, 3, 4, 5], [3, 3, 4, 4]], [1, 0], 6, None, "d", spelling))
    job = Job(
        base="m",
        artifact=Artifact("served", "endpoint", "", "", "", 0, 0),
        backend="endpoint",
        options={"url": url, "model": "toy", "api": api, "api_key_env": parts.pop("key", None)},
        workload=Workload(),
        evaluations={"text": Evaluation("text", str(file), "d", 4, "all", 2, 5)},
        **parts,
    )
    found: Measurement = from_json(Measurement, score(to_json(job), lambda *_: None))
    return found


def test_a_server_that_echoes_is_scored_without_divergence(tmp_path: Path) -> None:
    with fake_server(tells=TELLS) as fake:
        found = scored(tmp_path, fake.url)
    first, second = found.qualities["text"]["windows"]
    assert (first["count"], first["nll_sum"]) == (2, pytest.approx(5.0))
    assert (second["count"], second["nll_sum"]) == (3, pytest.approx(4.5))
    assert "kld_sum" not in first and found.qualities["text"]["reference_digest"] is None
    assert found.settings["quality by"] == "echo"
    assert any("no divergence: the server tells" in text for text in found.warnings)


def test_choices_are_compared_by_what_it_tells_too(tmp_path: Path) -> None:
    item = {"id": 1, "windows": [[2, 3, 5], [2, 3, 4]], "first": 1, "choices": 1}
    path = tmp_path / "task-t.json"
    path.write_text(json.dumps({"vocab_size": 6, "bos": None, "stop": [], "longest": 3, "items": [item]}))
    with fake_server(tells=TELLS) as fake:
        found = scored(tmp_path, fake.url, tasks={"t": Task("t", str(path), "d", 1, 3)})
    assert found.tasks["t"]["correct"] == [1]


def test_a_server_that_tells_nothing_says_why(tmp_path: Path) -> None:
    with fake_server() as fake:
        found = scored(tmp_path, fake.url)
        assert sum("echo" in body for body in fake.asked) == 1, "it is asked once"
    assert not found.qualities
    (told,) = found.warnings
    assert told.startswith("no quality: the server tells no log-probabilities of a prompt in token ids (n_probs: ")
    assert "echo: 0 log-probabilities for a prompt of 4 tokens" in told


def test_a_server_with_another_tokenizer_is_not_scored(tmp_path: Path) -> None:
    others = {token: (text[::-1] + "y", value) for token, (text, value) in TELLS.items()}
    with fake_server(tells=others) as fake:
        found = scored(tmp_path, fake.url)
    assert not found.qualities and "served has another tokenizer than the base" in found.warnings[0]


@pytest.mark.parametrize(
    ("piece", "text", "same"),
    [
        ("Ġthe", " the", True),
        ("▁the", "the", True),
        ("<0x2C>", ",", True),
        ("Ã©", "é", True),
        ("Ċ", "\n", True),
        ("the", "teh", False),
        ("<0x2C>", ";", False),
        ("Ã", "\ufffd", None),
        ("<|end|>", "", None),
        (None, "x", None),
    ],
)
def test_what_a_server_calls_a_token_is_what_its_piece_spells(piece: str | None, text: str, same: bool | None) -> None:
    expected = {True: piece, False: text, None: None}[same]
    assert as_spelt(piece, text) == expected


def test_a_context_smaller_than_the_windows_is_the_servers_own_word(tmp_path: Path) -> None:
    with fake_server(tells=TELLS, context=3) as fake:
        found = scored(tmp_path, fake.url)
    assert not found.qualities and "more than 3 tokens" in found.warnings[0]


def test_a_busy_server_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "BUSY_S", (0.0, 0.0))
    with fake_server(tells=TELLS, busy=2) as fake:
        assert scored(tmp_path, fake.url).qualities
    with fake_server(tells=TELLS, busy=10**6) as fake:
        assert "status 429" in scored(tmp_path, fake.url).warnings[0]


def test_a_server_that_chats_answers_tasks_in_its_own_template(tmp_path: Path) -> None:
    chat = {
        "id": 1,
        "prompt": [2, 3],
        "message": "Capital of France?",
        "contains": ["Paris"],
        "stop": [],
        "new_tokens": 5,
    }
    plain = {name: value for name, value in chat.items() if name != "message"}
    tasks = {}
    for name, item in (("chat", chat), ("plain", plain)):
        path = tmp_path / f"task-{name}.json"
        path.write_text(json.dumps({"vocab_size": 6, "bos": None, "stop": [], "longest": 7, "items": [item]}))
        tasks[name] = Task(name, str(path), "d", 1, 7)
    with fake_server(apis=("chat",), says="It is Paris.") as fake:
        found = scored(tmp_path, fake.url, "chat", tasks=tasks)
        assert [body["messages"][0]["content"] for body in fake.asked] == ["Capital of France?"]
    assert (found.tasks["chat"]["correct"], found.tasks["chat"]["given"]) == ([1], ["It is Paris."])
    assert "plain" not in found.tasks
    told = " ".join(found.warnings)
    assert "the server only chats, and tells nothing" in told and "give the task `chat: true`" in told
    with fake_server(says=" Paris") as fake:
        found = scored(tmp_path, fake.url, tasks={"plain": tasks["plain"]})
    assert found.tasks["plain"]["correct"] == [1]


def test_the_key_is_read_from_its_variable_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "sk-secret-1")
    with fake_server(tells=TELLS, key="sk-secret-1") as fake:
        assert scored(tmp_path, fake.url, key="MINE").qualities
    monkeypatch.setenv("MINE", "sk-secret-2")
    with fake_server(tells=TELLS, key="sk-secret-1") as fake:
        found = scored(tmp_path, fake.url, key="MINE")
    assert not found.qualities and "sk-" not in json.dumps(to_json(found))


def test_losses_are_those_of_the_whole_vocabulary() -> None:
    """The same numbers by the reduction of logits and by a server's own losses."""
    import torch

    from workbench.worker.scoring.reducer import Reducer, Scoring, of_losses

    asked = Scoring(TokenFile([[1, 0, 2, 1]], [0], 3), greedy=True)
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.5, 0.0]])
    reducer = Reducer(asked)
    reducer(0, 0, logits)
    losses = [-float(torch.log_softmax(row, -1)[token]) for row, token in zip(logits, [0, 2, 1], strict=True)]
    ours, theirs = reducer.result()["windows"][0], of_losses(asked, [(losses, [True, True, False])])["windows"][0]
    assert theirs["nll_sum"] == pytest.approx(ours["nll_sum"], rel=1e-6)
    assert (theirs["count"], theirs["greedy_sum"]) == (ours["count"], ours["greedy_sum"]) == (3, 2)
    assert math.isfinite(theirs["nll_sum"])
