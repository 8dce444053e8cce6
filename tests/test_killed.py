"""`kill -9` of a run, or of its workers, in every step: nothing is lost, nothing is half there, nobody is left running,
and the next run gives what an undisturbed one gives.

A step's moment is a part of the time that it took the undisturbed run: engines load for most of it, so it is late.
Whatever it hits, the same must hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench import Bench

pytestmark = pytest.mark.slow
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 40
PARTS: dict[str, Any] = {
    "evaluation": {"source": {"text": TEXT}, "window": 64, "windows": 8},
    "calibration": {"source": {"text": TEXT[::-1]}, "window": 64, "windows": 16},
    "variants": [{"gguf": {"type": "Q4_0", "imatrix": True}}, {"awq": {"group_size": 32}}],
    "backends": {"llamacpp": {"variants": ["base", "gguf*"]}, "transformers": {"variants": ["awq*"]}},
}


STEP = re.compile(r"(.*): [\d.]+ s|(\S+ +\S+)  .*\(\d+ of \d+ jobs.*\)")
"""What a run says of a step that is done, or of a job."""


@dataclass(frozen=True)
class Quiet:
    """An undisturbed run: its steps in order with their seconds, its figures, its files' checksums."""

    steps: dict[str, float]
    figures: list[Any]
    files: dict[str, str]


def figures(place: Bench) -> list[Any]:
    lines = json.loads(place("table", "--format", "json").stdout)
    kept = ("variant", "backend", "perplexity", "kld_mean", "top1_agreement", "bits_per_weight", "disk_bytes", "error")
    return [[line[key] for key in kept] for line in lines]


def files(place: Bench) -> dict[str, str]:
    """What was made, without the records, which say how long it took."""
    found = [
        file for kind in ("artifacts", "imatrix", "references", "tokens") for file in place.home.glob(f"{kind}/**/*")
    ]
    return {
        str(file.relative_to(place.home)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in found
        if file.is_file() and not (file.suffix == ".json" and file.parents[1].parent == place.home)
    }


class Running:
    """A run, what it has said so far, and its worker."""

    def __init__(self, place: Bench, *words: str) -> None:
        self.child = place.start(*words)
        self.said: list[str] = []
        self.seconds: dict[str, float] = {}
        """By step that is done: how long after the one before."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stderr is not None
        last = time.monotonic()
        for line in self.child.stderr:
            self.said.append(line.rstrip())
            if found := STEP.fullmatch(self.said[-1]):
                self.seconds[found[1] or found[2]] = time.monotonic() - last
                last = time.monotonic()

    def steps(self) -> list[str]:
        return list(self.seconds)

    def worker(self) -> psutil.Process | None:
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.child.pid).children():
                if "workbench.machine.isolate" in process.cmdline():
                    return process
        return None

    def until(self, true: Callable[[], Any]) -> Any:
        """What it gives at last, or None if the run ends before."""
        limit = time.monotonic() + 300
        while self.child.poll() is None:
            if found := true():
                return found
            if time.monotonic() > limit:
                raise AssertionError("it never came to that")
            time.sleep(0.005)
        return None

    def end(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(timeout=300)
        self.child.kill()
        self._reader.join(timeout=10)
        assert not any("Traceback" in line for line in self.said), self.said
        return self.child.wait()


def nobody_left(place: Bench) -> None:
    limit = time.monotonic() + 10
    while place.workers():
        if time.monotonic() > limit:
            raise AssertionError(f"left running: {place.workers()}")
        time.sleep(0.02)


def nothing_half(place: Bench) -> None:
    """What has its final name is whole, and every line of the results is."""
    assert place("cache", "verify").returncode == 0
    for kind in ("artifacts", "bases", "imatrix", "references", "tokens"):
        for folder in place.home.glob(f"{kind}/*"):
            assert folder.suffix == ".partial" or list(folder.glob("*.json")), folder
    for file in place.results.glob("*/rows.jsonl"):
        *whole, _ = file.read_text().split("\n")
        for line in whole:
            json.loads(line)


def completes(place: Bench, quiet: Quiet) -> None:
    """The next run ends well with the same figures and the same files, and leaves nothing beside them."""
    run = Running(place, "run", place.recipe(**PARTS))
    assert run.end() == 0, run.said
    assert figures(place) == quiet.figures and files(place) == quiet.files
    left = [path.name for path in place.home.rglob("*.partial")] + list(place.home.glob("logs/*.partial"))
    assert not left and not list(place.home.parent.glob("workbench-*"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_llama: Any, make_tokenizer: Any) -> Path:
    folder: Path = make_tokenizer(make_llama(tmp_path_factory.mktemp("killed") / "Tiny", layers=3, hidden=128))
    return folder


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Quiet:
    folder = tmp_path_factory.mktemp("quiet")
    place = Bench(folder / "new" / "home", folder, model)
    (folder / "new").mkdir()
    run = Running(place, "run", place.recipe(**PARTS))
    assert run.end() == 0, run.said
    return Quiet(run.seconds, figures(place), files(place))


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Iterator[Bench]:
    (tmp_path / "new").mkdir()
    found = Bench(tmp_path / "new" / "home", tmp_path, model)
    yield found
    assert not found.workers()


def test_a_run_that_is_killed_in_every_step(place: Bench, quiet: Quiet) -> None:
    chance, names = random.Random(3), list(quiet.steps)
    assert len(names) >= 10, quiet.steps
    hit, finished, first, wanted = list[str](), set[str](), "", 0
    while True:
        run = Running(place, "run", place.recipe(**PARTS))
        if run.until(lambda run=run, wanted=wanted: len(run.steps()) >= wanted and run.worker()):
            hit.append(next((name for name in names if name not in finished | set(run.steps())), names[-1]))
            moment = time.monotonic() + quiet.steps[hit[-1]] * chance.uniform(0.2, 0.9)
            run.until(lambda moment=moment: time.monotonic() > moment)
        rows = place.rows()
        if run.child.poll() == 0:
            break
        run.child.kill()
        run.end()
        nobody_left(place)
        nothing_half(place)
        assert place.rows()[: len(rows)] == rows, "what was stored stays"
        # A step further each time; where nothing of it was kept, more.
        before, first = first, [*run.steps(), ""][0]
        wanted = wanted + 2 if first == before else 1
        finished |= set(run.steps())
        assert len(hit) < 40, hit
    run.end()
    assert len(set(hit)) >= 8, hit
    completes(place, quiet)


def test_workers_that_are_killed_in_every_step(place: Bench, quiet: Quiet) -> None:
    """The run says so and goes on with what can go on, or ends with exit code 1."""
    chance, step_s = random.Random(4), statistics.median(quiet.steps.values())
    for passing in (0, 1, 1, 4):
        run, killed = Running(place, "run", place.recipe(**PARTS)), 0
        while worker := run.until(lambda run=run, passing=passing: len(run.steps()) >= passing and run.worker()):
            moment = time.monotonic() + chance.uniform(0, step_s)
            run.until(lambda worker=worker, moment=moment: time.monotonic() > moment or not worker.is_running())
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
                worker.wait(timeout=10)
                killed += 1
        assert run.end() == 1 and killed, run.said
        nobody_left(place)
        nothing_half(place)
        assert any("killed by SIGKILL" in line for line in run.said), run.said
    completes(place, quiet)


def test_a_run_that_is_killed_while_it_stores_a_row(place: Bench) -> None:
    recipe = place.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}], backends={"fake": {}})
    sizes: set[int] = set()

    def grown() -> bool:
        now = {file.stat().st_size for file in place.results.glob("*/rows.jsonl")}
        return bool(now - sizes)

    for _ in range(2):
        run = Running(place, "run", recipe)
        run.until(grown)
        run.child.kill()
        run.end()
        sizes |= {file.stat().st_size for file in place.results.glob("*/rows.jsonl")}
        nobody_left(place)
        nothing_half(place)
    assert Running(place, "run", recipe).end() == 0
    assert place.measured() == ["base", "gguf-Q4_0", "gguf-Q8_0"]


@pytest.mark.parametrize("words", [["publish", "site"], ["report", "--output", "site/report.html", "--plots", "site"]])
def test_pages_that_are_killed_while_they_are_written(place: Bench, words: list[str]) -> None:
    """Each file is the old one or the new one, never half of one."""
    assert place("run", place.recipe(backends={"fake": {}})).returncode == 0

    def tree() -> dict[str, bytes]:
        return {
            str(p.relative_to(place.folder)): p.read_bytes() for p in (place.folder / "site").rglob("*") if p.is_file()
        }

    began = time.monotonic()
    assert place.typed(*words).returncode == 0
    span_s, old = time.monotonic() - began, tree()
    assert place("run", place.recipe(backends={"fake": {}}), "--again").returncode == 0
    mixed = []
    for part in range(10):
        child = place.start(*words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=span_s * (0.4 + 0.6 * part / 10))
        child.kill()
        child.communicate()
        mixed.append(tree())
    for half in (place.folder / "site").rglob(".*.partial"):
        os.utime(half, (0, 0))
    assert place.typed(*words).returncode == 0
    new = tree()
    assert not [name for name in new if "partial" in name] and new != old
    for each in mixed:
        assert all(content in (old.get(name), new.get(name)) for name, content in each.items() if name in new)
