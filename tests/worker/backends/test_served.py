"""Engines that are servers: started, asked, ended, whatever happens to whom."""

from __future__ import annotations

import importlib.util
import json
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
from workbench.report import store

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
    for words in ("served b3", "3 at once: 36 requests", "over HTTP only speed is measured"):
        assert words in told, done.stdout
    assert not servers()
    assert "--model" in " ".join(bench("recommend", str(bench.results)).stdout.split())


@pytest.mark.slow
def test_its_row_stands_beside_that_of_the_engines_own_process(bench: Bench, path: str) -> None:
    scored = {"source": {"text": TEXT}, "window": 64, "windows": 4}
    engines = {"llamacpp": {"variants": ["base"]}, "llama-server": {"variants": ["base"]}}
    done = bench("run", bench.recipe(backends=engines, workload=LOAD, evaluation=scored), PATH=path)
    assert done.returncode == 0, done.stderr
    lines = {line["backend"]: line for line in json.loads(bench("table", "--format", "json").stdout)}
    assert lines["llamacpp"]["perplexity"] and lines["llama-server"]["perplexity"] is None
    assert lines["llamacpp"]["prompt_tokens"] == lines["llama-server"]["prompt_tokens"] == 40
    assert {"served b1", "served b3"} <= lines["llamacpp"]["points"].keys() & lines["llama-server"]["points"].keys()
    chosen = bench("recommend", str(bench.results), "--min-served", "1", "--batch", "3")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr


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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_the_llama_server_of_xllamacpp(bench: Bench) -> None:
    options = {"flash_attention": True, "mmap": False, "variants": ["base"]}
    requests = measured(bench, backends={"llama-server": options})
    answered = [each for each in requests if not each.error]
    # A random model's tokens are halves of characters, which a server keeps to itself: some answers have no text.
    assert len(answered) > 24 and {each.error for each in requests if each.error} <= {"no text at all"}
    assert {each.prompt_tokens for each in answered} == {40}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_server(bench: Bench, tmp_path: Path) -> None:
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head_dim=32))
    options = {"vllm-serve": {"enforce_eager": True, "variants": ["base"]}}
    requests = measured(bench, base={"path": str(base)}, model="Small", backends=options)
    assert not any(each.error for each in requests), [each.error for each in requests if each.error][:3]
    assert {each.prompt_tokens for each in requests} == {40}
    assert {each.new_tokens for each in requests} <= set(range(4, 13))
