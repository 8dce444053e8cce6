"""Engines that are servers: started, asked, ended, whatever happens to whom."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench import Bench
from tests.places import ROOT
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.records import Quality, Task
from workbench.report import store
from workbench.worker.backends import next_token
from workbench.worker.backends.llama_server import Engine as LlamaServer
from workbench.worker.backends.served import NotScored
from workbench.worker.measure.answers import answer
from workbench.worker.scoring.reducer import Scoring
from workbench.worker.tokens.file import TokenFile

LOAD = {"prompt_tokens": [40, 20], "new_tokens": 8, "batch": [1, 3], "requests": 4, "repeats": 3}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with a llama-server that is none."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.serving.fake_llama_server "$@"\n')
    program.chmod(0o755)
    return f"{program.parent}{os.pathsep}{os.environ['PATH']}"


def recipe(bench: Bench, **more: Any) -> str:
    return bench.recipe(backends={"llama-server": {"variants": ["base"]}}, workload=LOAD, **more)


def test_a_server_is_an_engine(bench: Bench, path: str) -> None:
    done = bench("run", recipe(bench), PATH=path)
    assert done.returncode == 0, done.stderr
    (row,), _ = store.read(bench.results)
    assert row.measurement is not None and row.measurement.serving is not None and row.backend == "llama-server"
    first, second = row.measurement.speeds
    assert (first.prompt_tokens, second.prompt_tokens, len(first.first_token_s)) == (40, 20, 3)
    assert sum(first.step_tokens[0]) == 7 and first.rounds and row.measurement.load_s
    points = row.measurement.serving.points
    assert sorted((point.level, len(point.requests)) for point in points) == [(1, 4)] * 3 + [(3, 12)] * 3
    assert not any(request.error for point in points for request in point.requests)
    assert row.measurement.settings["server"] == "version: 7 (fake)"
    told = " ".join(done.stdout.split())
    for words in ("served b3", "3 at once: 36 requests"):
        assert words in told, done.stdout
    assert not servers()
    assert "--model" in " ".join(bench("recommend", str(bench.results)).stdout.split())


@pytest.mark.slow
def test_its_row_stands_beside_that_of_the_engines_own_process(bench: Bench, path: str) -> None:
    engines = {"llamacpp": {"variants": ["base"]}, "llama-server": {"variants": ["base"]}}
    done = bench("run", bench.recipe(backends=engines, workload=LOAD), PATH=path)
    assert done.returncode == 0, done.stderr
    lines = {line["backend"]: line for line in json.loads(bench("table", "--format", "json").stdout)}
    assert lines["llamacpp"]["prompt_tokens"] == lines["llama-server"]["prompt_tokens"] == 40
    assert {"served b1", "served b3"} <= lines["llamacpp"]["points"].keys() & lines["llama-server"]["points"].keys()
    chosen = bench("recommend", str(bench.results), "--min-served", "1", "--batch", "3")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr


def scored_by(answer: object, vocab_size: int) -> Quality:
    """What a llama-server's row says of two positions if its answers are so."""
    engine = LlamaServer.__new__(LlamaServer)
    answers = {"/tokenize": {"tokens": [1, 2]}, "/completion": answer}
    engine.post = lambda path, body: json.dumps(answers[path]).encode()  # type: ignore[method-assign]
    return engine.score(Scoring(TokenFile([[1, 2, 0]], [0], vocab_size)), lambda index: None)


def test_llama_server_is_scored_by_the_whole_vocabulary_or_not_at_all() -> None:
    def told(*likely: tuple[int, float]) -> object:
        return {"completion_probabilities": [{"top_logprobs": [{"id": i, "logprob": p} for i, p in likely]}]}

    # Of the id that float32 has no probability for, 104 nats; an id beyond the vocabulary is nobody's.
    (window,) = scored_by(told((2, math.log(0.75)), (1, math.log(0.25)), (0, -3.4e38), (5, -1.0)), 3)["windows"]
    assert window["nll_sum"] == pytest.approx(104 - math.log(0.75)) and window["nonfinite"] == 0
    with pytest.raises(RuntimeError, match="2 log-probabilities of a vocabulary of 3"):
        scored_by(told((2, -0.1), (1, -2.4)), 3)
    with pytest.raises(RuntimeError, match="0 log-probabilities"):
        scored_by({"content": ""}, 3)
    with pytest.raises(NotScored, match="2 positions are too many"):
        scored_by({}, 10**9)


def test_a_chat_is_asked_of_a_server_in_its_own_template(tmp_path: Path) -> None:
    item = {"id": 1, "prompt": [1], "message": "Capital?", "contains": ["Paris"], "stop": [], "new_tokens": 5}
    (tmp_path / "task-t.json").write_text(json.dumps({"vocab_size": 3, "bos": None, "stop": [], "items": [item]}))
    task = Task("t", str(tmp_path / "task-t.json"), "d", 1, 6)
    engine, asked = LlamaServer.__new__(LlamaServer), []
    engine.name = "served"

    def post(path: str, body: Any) -> bytes:
        asked.append((path, body["messages"], body["max_tokens"]))
        return json.dumps({"choices": [{"message": {"content": "Paris."}}]}).encode()

    engine.post = post  # type: ignore[method-assign]
    assert answer(engine, task)["correct"] == [1]
    assert asked == [("/v1/chat/completions", [{"role": "user", "content": "Capital?"}], 5)]
    engine.post = lambda path, body: b'{"choices": []}'  # type: ignore[method-assign]
    with pytest.raises(NotScored, match="no answer of this API"):
        answer(engine, task)


@pytest.mark.parametrize(("apart", "told"), [(0.3, True), (1e-4, False)])
def test_a_llama_servers_row_says_within_what_rounding_it_is_known(apart: float, told: bool) -> None:
    """Twelve of 24 positions, computed in one piece, have a loss that is now so much more, now so much less."""
    pieces = 0

    def post(path: str, body: Any) -> bytes:
        nonlocal pieces
        if path == "/tokenize":
            return json.dumps({"tokens": [1]}).encode()
        change = 0.0
        if not body["cache_prompt"]:
            pieces += 1
            change = apart * (-1) ** pieces
        likely = [{"id": i, "logprob": math.log(p) + change} for i, p in enumerate((0.5, 0.25, 0.25))]
        return json.dumps({"completion_probabilities": [{"top_logprobs": likely}]}).encode()

    asked = Scoring(TokenFile([[0] * 13, [0] * 13], [0, 0], 3))
    quality, doubts = next_token.by_llama_server(asked, lambda index: None, post)
    assert pieces == 12 and len(quality["windows"][0]["nll"]) == 12
    # Student's t at 97.5 % and 12 degrees of freedom is 2.18.
    bound = math.expm1(2.2 * 0.3 / math.sqrt(24))
    assert [f"within {bound:.1%}" in text for text in doubts] == [True] * told


@pytest.mark.parametrize(
    ("how", "words"),
    [("dies at once", "ended with code 3; its last words: no such architecture"), ("dies at 9", "ended")],
)
def test_a_server_that_dies(how: str, words: str, bench: Bench, path: str) -> None:
    done = bench("run", recipe(bench), PATH=path, LLAMA_FAKE=how)
    assert done.returncode == 1
    (row,), _ = store.read(bench.results)
    assert row.error is not None and words in row.error, row.error
    assert not servers()


def servers() -> list[psutil.Process]:
    """Fake ones that still run."""
    return [each for each in psutil.process_iter() if "tests.serving.fake_llama_server" in " ".join(_words(each))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.Error:
        return []


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_nothing_is_left_running(end: signal.Signals, bench: Bench, path: str) -> None:
    child = bench.start("run", recipe(bench), PATH=path, LLAMA_FAKE="")
    bench.wait_for(lambda: bool(servers()), child)
    child.send_signal(end)
    child.wait(60)
    _until(lambda: not servers() and not bench.workers())


def _until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to that")


# --- real servers -------------------------------------------------------------------------------


def measured(bench: Bench, **parts: Any) -> Any:
    done = bench("run", bench.recipe(workload=LOAD, **parts))
    assert done.returncode == 0, done.stderr + done.stdout
    (row,), _ = store.read(bench.results)
    assert row.error is None and row.measurement is not None
    assert [len(each.first_token_s) for each in row.measurement.speeds] == [3, 3]
    requests = [each for point in row.measurement.serving.points for each in point.requests]
    assert len(requests) == 48
    return requests


SCORED = {"evaluation": {"source": {"text": TEXT}, "window": 64, "windows": 4}}
TASK = """
- {prompt: "The quick brown fox", choices: [jumps, sits, flies, "does not mind"], answer: jumps}
- {prompt: "and the dog does", contains: q, new_tokens: 6}
- {prompt: "over the lazy", regex: "[a-m]", new_tokens: 9}
"""


def agreeing(bench: Bench, engine: str, server: str, base: Path, **parts: Any) -> None:
    """Measure one file in an engine's own process and by its server: the same quality, and the same answers."""
    (bench.folder / "own.yaml").write_text(TASK)
    tasks = {"own": {"file": str(bench.folder / "own.yaml")}}
    done = bench("run", bench.recipe(base={"path": str(base)}, workload=LOAD, tasks=tasks, **SCORED, **parts))
    assert done.returncode == 0, done.stderr + done.stdout
    lines = {(line["variant"], line["backend"]): line for line in json.loads(bench("table", "--format", "json").stdout)}
    variants = {variant for variant, _ in lines}
    for variant in variants:
        here, there = lines[variant, engine], lines[variant, server]
        assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-3)
        # The server may be of another build, which rounds otherwise.
        assert here["kld_mean"] > 0 and there["kld_mean"] == pytest.approx(here["kld_mean"], rel=0.02, abs=5e-6)
        assert there["top1_agreement"] == pytest.approx(here["top1_agreement"], abs=0.01)
    rows, _ = store.read(bench.results)
    given = {
        (row.artifact.variant, row.backend): row.measurement.tasks["own"]["given"] for row in rows if row.measurement
    }
    assert all(given[variant, engine] == given[variant, server] for variant in variants), given
    assert not any("quality" in text for row in rows if row.measurement for text in row.measurement.warnings)


LLAMAS = [("llama-server", "xllamacpp"), ("llama-cpp-server", "starlette_context")]
"""Servers of GGUF files, and what must be there for them."""


@pytest.mark.slow
@pytest.mark.parametrize(("server", "needed"), LLAMAS)
def test_a_llamas_server_is_timed(server: str, needed: str, bench: Bench, talking_llama: Path) -> None:
    pytest.importorskip(needed)
    options = {"flash_attention": True, "mmap": False, "variants": ["base"]}
    base = {"path": str(talking_llama)}
    requests = measured(bench, base=base, model="Talking", backends={server: options})
    assert not {each.error for each in requests} - {""}
    assert {each.prompt_tokens for each in requests} == {40}
    assert {each.new_tokens for each in requests} <= set(range(4, 13))


@pytest.mark.slow
@pytest.mark.parametrize(("server", "needed"), LLAMAS)
def test_a_llamas_server_is_as_good_as_its_file(server: str, needed: str, bench: Bench, talking_llama: Path) -> None:
    pytest.importorskip(needed)
    engines = {name: {"variants": ["gguf-Q8_0"]} for name in ("llamacpp", server)}
    agreeing(bench, "llamacpp", server, talking_llama, model="Talking", backends=engines)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_server(bench: Bench, tmp_path: Path) -> None:
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    options = {"enforce_eager": True, "variants": ["base"]}
    agreeing(bench, "vllm", "vllm-serve", base, model="Small", backends={"vllm": options, "vllm-serve": options})
    (row,) = [each for each in store.read(bench.results)[0] if each.backend == "vllm-serve"]
    assert row.measurement is not None and row.measurement.serving is not None
    assert row.measurement.settings["scored_logits"] == "float32"
    assert [len(each.first_token_s) for each in row.measurement.speeds] == [3, 3]
    requests = [each for point in row.measurement.serving.points for each in point.requests]
    assert len(requests) == 48 and not any(each.error for each in requests)
    assert {each.prompt_tokens for each in requests} == {40}
    assert {each.new_tokens for each in requests} <= set(range(4, 13))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "needed", "word"),
    [("llama-cpp-server", "starlette_context", "llama_cpp_inside"), ("vllm-serve", "vllm", "VLLM::EngineCore")],
)
def test_nothing_of_a_real_server_is_left(server: str, needed: str, word: str, bench: Bench, tmp_path: Path) -> None:
    """Not even the process that vLLM's server starts for its engine, which the workbench never saw."""
    pytest.importorskip(needed)
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    engines = {server: {"variants": ["base"]}}
    child = bench.start("run", bench.recipe(base={"path": str(base)}, model="Small", workload=LOAD, backends=engines))
    started: list[psutil.Process] = []

    def up() -> bool:
        started[:] = psutil.Process(child.pid).children(recursive=True)
        return any(word in " ".join(_words(each)) for each in started)

    bench.wait_for(up, child)
    child.kill()
    child.wait(60)
    _until(lambda: not any(map(_words, started)))
