"""A server as a row: measured, stored, shown; and everything a server or a person can do wrong."""

from __future__ import annotations

import functools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.bench import Bench
from tests.command import command
from tests.serving.fake_server import Fake, fake_server
from tests.serving.real_servers import llama_cpp_server, llama_server
from workbench.errors import UserError
from workbench.profile import endpoint
from workbench.profile.endpoint import limits_of
from workbench.profile.under_load import Found, Wish
from workbench.records import Request, Row, Speed
from workbench.report import store
from workbench.serving.client import SILENT_S, Client

SMALL: dict[str, Any] = {"prompt_tokens": 60, "new_tokens": 8, "requests": 12, "concurrency": (3,)}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def server() -> Iterator[Fake]:
    with fake_server() as fake:
        yield fake


def measured(fake: Fake, results: Path, **more: Any) -> Row:
    return wb.profile_endpoint(fake.url, results, **(SMALL | more))


def most_steps(speed: Speed) -> int:
    """Tokens after the first; of the repeat with the most, for on a busy machine several may arrive as one."""
    return max(map(sum, speed.step_tokens))


def test_a_server_is_a_row_like_any_other(server: Fake, results: Path) -> None:
    row = measured(server, results, rates=(200.0,), limits=("ttft:2s", "e2e:10s", "itl:5s"), requests=10)
    assert row.error is None and row.measurement is not None and row.measurement.serving is not None
    closed, poisson = row.measurement.serving.points
    assert (closed.arrivals, closed.level, len(closed.requests)) == ("closed", 3, 10)
    assert (poisson.arrivals, poisson.level, len(poisson.counted)) == ("poisson", 200, 10)
    lengths = [each.new_tokens for each in closed.requests]
    assert min(lengths) >= 4 and max(lengths) <= 12 and len({*lengths}) > 1
    (speed,) = row.measurement.speeds
    assert (speed.batch, len(speed.first_token_s), most_steps(speed)) == (1, 5, 7)
    assert abs(speed.prompt_tokens - 60) <= 2, "as the server counts them"
    assert row.measurement.serving.largest_rate is not None and row.measurement.serving.largest_rate[0] > 100
    prompts = [body["prompt"][:12] for body in server.asked]
    assert len({*prompts}) == len(prompts) - prompts.count("Once upon a ") + 1

    (stored,), warnings = store.read(results)
    assert (stored, warnings) == (row, [])
    table = wb.table(results)
    values = table.lines[0].values
    assert all(values[name] for name in ("decode_tok_s", "prefill_tok_s", "goodput_req_s", "largest_rate_req_s"))
    text = str(table)
    for words in ("served b3", "3 at once: 10 requests", "200/s poisson", "TTFT", "goodput", "keep ttft 2000 ms"):
        assert words in " ".join(text.split()), text
    for name in ("markdown", "csv", "json"):
        answer = command("table", str(results), "-f", name)
        assert (answer.returncode, "3 at once" in answer.stdout) == (0, True), answer.stderr
    chosen = command("recommend", str(results))
    assert f"served at {server.url}" in " ".join(chosen.stdout.split()), chosen.stdout
    page = results / "page.html"
    assert command("report", str(results), "-o", str(page)).returncode == 0 and "endpoint" in page.read_text()


def test_the_command(server: Fake, results: Path) -> None:
    words = ["--prompt-tokens", "60", "--new-tokens", "8", "--requests", "10", "--concurrency", "2", "-f", "json"]
    answer = command("profile", "--endpoint", server.url, "--results", str(results), *words)
    assert answer.returncode == 0, answer.stderr
    (found,) = json.loads(answer.stdout)
    assert found["loads"]["2 at once"]["asked"] == 10 and found["options"]["url"] == server.url
    assert "one at a time" in answer.stderr
    assert command("profile", "--slo", "ttft:1s").returncode == 2
    assert command("profile", "recipe.yaml", "--endpoint", server.url).returncode == 2


@pytest.mark.parametrize(
    "behaviour",
    [
        {"apis": ("chat",), "knows_extras": False, "ids": False},
        {"ids": False, "usage": False},
        {"ids": False, "usage": False, "ends_after": 2},
        {"a_chunk": 4},
        {"knows_extras": False},
    ],
    ids=["chat alone", "no count in streams", "ends early", "many tokens a chunk", "no extras"],
)
def test_servers_of_every_kind(behaviour: dict[str, Any], results: Path) -> None:
    with fake_server(**behaviour) as fake:
        row = measured(fake, results)
    assert row.error is None and row.measurement is not None
    assert most_steps(row.measurement.speeds[0]) in (7, 4)
    assert any("several tokens" in text for text in row.measurement.warnings) is ("a_chunk" in behaviour)


# --- what people do wrong ------------------------------------------------------------------------


def test_nobody_listens(results: Path) -> None:
    with fake_server() as fake:
        pass
    with pytest.raises(UserError, match="nobody listens there.*Start the server"):
        measured(fake, results)
    assert not results.exists()


def test_the_servers_own_models_are_offered(results: Path) -> None:
    with fake_server(models=["llama-8b", "qwen-7b"]) as fake:
        with pytest.raises(UserError, match="Did you mean 'llama-8b'"):
            measured(fake, results, model="lama-8b")
        with pytest.raises(UserError, match="name a model by --model: it has llama-8b, qwen-7b"):
            measured(fake, results)
        assert measured(fake, results, model="qwen-7b").base == "qwen-7b"


def test_keys_are_never_stored_or_told(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with fake_server(key="sk-right-1234", faults={3: "status 400"}) as fake:
        with pytest.raises(UserError, match="wants a key.*--api-key-env VAR"):
            measured(fake, results)
        monkeypatch.setenv("MINE", "sk-wrong-1234")
        with pytest.raises(UserError, match="refuses the key in MINE") as told:
            measured(fake, results, api_key_env="MINE")
        assert "sk-" not in str(told.value)
        monkeypatch.setenv("MINE", "sk-right-1234")
        assert measured(fake, results, api_key_env="MINE").error is None
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-right" not in path.read_bytes(), path


def test_another_machine_needs_a_word_once(results: Path) -> None:
    def refused(**more: Any) -> str:
        with pytest.raises(UserError) as told:
            wb.profile_endpoint("http://192.0.2.1:9/v1", results, **SMALL, **more)
        return str(told.value)

    assert "192.0.2.1 is not this machine. It would be sent about 27 requests, each some 60 tokens" in refused()
    assert "--yes-remote" in refused()


def test_another_machine_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.profile.endpoint import check_remote
    from workbench.serving.address import address_of

    address = address_of("http://far.example.com", "MINE", {"MINE": "sk-1"})
    with pytest.raises(UserError, match="with the key in clear text"):
        check_remote(address, Wish(), False)
    check_remote(address, Wish(), True)
    check_remote(address, Wish(), False)
    with pytest.raises(UserError, match="other.example.com is not this machine"):
        check_remote(address_of("http://other.example.com"), Wish(), False)


@pytest.mark.parametrize(
    "word", ["ttft", "ttft:5", "ttft:0ms", "ttft:-1ms", "speed:5ms", "ttft:1e3ms", ":5ms", "ttft:5ms:6ms"]
)
def test_limits_that_are_none(word: str) -> None:
    with pytest.raises(UserError, match="--slo"):
        limits_of([word])
    assert limits_of(["ttft:500ms", "e2e:1.5s", "itl:50us"]) == {"ttft": 0.5, "e2e": 1.5, "itl": 5e-5}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rates": (0.0,)}, "--rate 0"),
        ({"arrivals": "often"}, "--arrivals"),
        ({"requests": 3}, "--requests 3"),
        ({"concurrency": (0,)}, "--concurrency 0"),
    ],
)
def test_wishes_that_cannot_be(more: dict[str, Any], words: str, server: Fake, results: Path) -> None:
    with pytest.raises(UserError, match=words):
        measured(server, results, **more)


# --- what servers do wrong -----------------------------------------------------------------------


def test_a_context_that_is_too_small(results: Path) -> None:
    with (
        fake_server(context=64) as fake,
        pytest.raises(UserError, match="takes no prompt of 60 tokens.*smaller --prompt-tokens"),
    ):
        measured(fake, results)


def test_a_server_that_answers_as_another_model(results: Path) -> None:
    with (
        fake_server(answers_as="cheaper") as fake,
        pytest.raises(UserError, match="asked for 'toy', 'cheaper' answers"),
    ):
        measured(fake, results)
    with fake_server(faults={10: "other model"}) as fake:
        row = measured(fake, results)
    assert row.error is None and row.measurement is not None
    assert any("answers as another model" in text for text in row.measurement.warnings)


def test_a_server_that_cannot_be_counted(results: Path) -> None:
    with (
        fake_server(faults={-1: "doubled"}) as fake,
        pytest.raises(UserError, match="cannot be measured: .* doubled lines"),
    ):
        measured(fake, results)


def test_single_faults_are_counted_and_the_rest_is_measured(results: Path) -> None:
    faults = {11: "status 500", 12: "garbage", 13: "not utf-8", 14: "end", 15: "doubled", 2: "wrong usage"}
    with fake_server(faults=faults) as fake:
        row = measured(fake, results)
    assert row.error is None and row.measurement is not None and row.measurement.serving is not None
    (point,) = row.measurement.serving.points
    assert len({each.error for each in point.requests if each.error}) == 5
    told = " ".join(row.measurement.warnings)
    assert "3 at once: 5 of 12 requests failed" in told and "1 at once: 1 of 5 requests failed" in told
    assert len(row.measurement.speeds[0].first_token_s) == 4
    assert "5 failed" in str(wb.table(results))


def test_a_server_that_falls_silent_or_hangs_up(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute's silence, here a fifth of a second, ends a request; not the load, where others are answered."""
    assert SILENT_S == 60
    monkeypatch.setattr(endpoint, "Client", functools.partial(Client, silent_s=0.2))
    with fake_server(faults={11: "stall", 13: "reset"}) as fake:
        row = measured(fake, results)
    assert row.error is None and row.measurement is not None and row.measurement.serving is not None
    (point,) = row.measurement.serving.points
    failed = [each for each in point.requests if each.error]
    assert sorted(each.error.partition(" after")[0] for each in failed) == [
        "no token for 0.2 s",
        "the connection ended",
    ]
    assert all(each.first_token_s for each in failed), "what had come is kept"
    assert "3 at once: 2 of 12 requests failed" in " ".join(row.measurement.warnings)


def test_a_server_that_takes_few_at_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.serving.load.BUSY_S", 0.02)
    with fake_server(slots=2) as fake:
        row = measured(fake, results, concurrency=(6,), requests=30)
    assert row.error is None and row.measurement is not None and row.measurement.serving is not None
    (point,) = row.measurement.serving.points
    assert 0 < sum("429" in each.error for each in point.requests) < 30


def test_a_server_that_dies_leaves_what_was_measured(results: Path) -> None:
    with fake_server() as fake:

        def end() -> None:
            while fake.streamed < 40:
                time.sleep(0.001)
            fake.close()

        killer = threading.Thread(target=end)
        killer.start()
        row = measured(fake, results, requests=100)
        killer.join()
    assert row.error is not None and "the server is gone since 3 at once" in row.error
    assert row.measurement is not None and row.measurement.serving is not None
    (point,) = row.measurement.serving.points
    good = [each for each in point.requests if not each.error]
    assert 20 < len(good) < 100 and len(point.requests) < 60
    (stored,), _ = store.read(results)
    assert stored == row and len(row.measurement.speeds[0].first_token_s) == 5
    assert "failed" in str(wb.table(results))
    answer = command("recommend", str(results))
    assert "the server is gone" in " ".join((answer.stdout + answer.stderr).split())


@pytest.mark.slow
def test_an_interrupt_leaves_what_was_measured(bench: Bench) -> None:
    with fake_server(token_s=0.01) as fake:
        words = ["--prompt-tokens", "60", "--new-tokens", "8", "--requests", "500", "--concurrency", "2"]
        child = bench.start("profile", "--endpoint", fake.url, *words)
        bench.wait_for(lambda: fake.streamed > 40, child)
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=30)
    assert child.returncode == 130 and "Traceback" not in told, told
    (row,), _ = store.read(bench.results)
    assert row.error == "interrupted" and row.measurement is not None and row.measurement.serving is not None
    (point,) = row.measurement.serving.points
    assert 10 < len(point.requests) < 500 and not any(each.error for each in point.requests)
    assert len(row.measurement.speeds[0].first_token_s) == 5


def test_answers_that_come_all_at_once_have_no_decoding_speed() -> None:
    made = Request(0.0, 0.0, 60, 0.5, 0.4, [0.05, 0.05], [1, 1, 1])
    held = Request(0.0, 0.0, 60, 0.5, 0.5, [0.0, 1e-6], [1, 1, 1])
    found = Found(single=[made, held])
    (speed,) = found.speeds(Wish(new_tokens=3))
    assert (speed.step_s, speed.step_tokens) == ([[0.05, 0.05], []], [[1, 1], []])
    assert len(speed.first_token_s) == 2 and any("all at once" in text for text in found.warnings())
    assert not Found(single=[made]).warnings()


# --- real ones -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "needed", "how"),
    [(llama_server, "xllamacpp", "usage"), (llama_cpp_server, "starlette_context", "length")],
    ids=["llama-server", "llama_cpp.server"],
)
def test_a_real_server(server: Any, needed: str, how: str, talking_file: Path, results: Path, tmp_path: Path) -> None:
    pytest.importorskip(needed)
    with server(talking_file, tmp_path, "small") as url:
        with pytest.raises(UserError, match="no model 'smal'. Did you mean 'small'"):
            wb.profile_endpoint(url, results, model="smal", **SMALL)
        with pytest.raises(UserError, match="takes no prompt of 5000 tokens"):
            wb.profile_endpoint(url, results, **(SMALL | {"prompt_tokens": 5000}))
        row = wb.profile_endpoint(url, results, **(SMALL | {"concurrency": (2, 4), "rates": (20.0,)}))
    assert row.error is None and row.measurement is not None and row.measurement.serving is not None
    assert row.measurement.settings["tokens counted by"] == how and row.base == "small"
    asked = [each for point in row.measurement.serving.points for each in point.requests]
    answers = [each for each in asked if not each.error]
    # On a busy machine an answer may come so much faster than those before that it is taken for a cache's.
    assert len(answers) > 10, {each.error for each in asked}
    assert all(abs(each.prompt_tokens - 60) <= 3 for each in answers)
