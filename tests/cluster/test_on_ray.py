"""A real Ray cluster of three nodes on this machine: the same rows as without one, and nothing lost or done twice when
a node, a worker or the driver is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.cluster.raylets import Raylets, free_port
from tests.places import ROOT

pytest.importorskip("ray", reason="pip install 'ray[client]'")
pytestmark = pytest.mark.slow

SLOW = {"WORKBENCH_FAKE_BACKEND": "1", "WORKBENCH_FAKE_SLOWER": "40", "HF_HUB_OFFLINE": "1"}
"""Jobs of the engine for tests that take about a second a repeat, so that one can be killed in its middle."""
KINDS = ("artifacts", "tokens", "imatrix", "references")
TYPES = ("Q8_0", "Q5_0", "Q4_0")


@pytest.fixture
def raylets(tmp_path: Path) -> Iterator[Callable[..., Raylets]]:
    started: list[Raylets] = []

    def start(nodes: int = 3, **environment: str) -> Raylets:
        started.append(Raylets(tmp_path, nodes, environment))
        return started[-1]

    yield start
    for each in started:
        each.close()


def stored(folder: Path) -> list[dict[str, Any]]:
    """Every row that was ever stored there."""
    files = sorted(folder.glob("**/rows*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines() if line.endswith("}")]


def made(store: Path) -> Counter[str]:
    """How often each entry was made: its uploads that are whole."""
    entries = [file.parent for kind in KINDS for file in store.glob(f"{kind}/*/current.json")]
    return Counter({str(entry.relative_to(store)): len([*entry.glob("*/")]) for entry in entries})


def qualities(rows: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """All that does not depend on the machine, by engine and variant, to the last digit."""
    return {
        (row["backend"], row["artifact"]["variant"]): (
            row["measurement"] and row["measurement"]["qualities"],
            row["artifact"]["digest"],
            row["unsupported"],
        )
        for row in rows
    }


class Driver:
    """`workbench run ... --on ray` beside the cluster, as somebody types it."""

    def __init__(self, bench: Bench, cluster: Raylets, store: str) -> None:
        self._bench, self._cluster, self._store = bench, cluster, store

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", *words, "--on", "ray", "--store", self._store],
            cwd=self._bench.folder,
            env=self._bench.environment(RAY_ADDRESS=self._cluster.address, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        child = self.start(*words, **more)
        try:
            out, err = child.communicate(timeout=1500)
        finally:
            child.kill()
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(words, child.returncode, out, err)


def until(true: Callable[[], object], limit_s: float = 120.0) -> None:
    limit = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > limit:
            pytest.fail("it never came to that")
        time.sleep(0.05)


@pytest.fixture
def bench(tmp_path: Path, tiny_llama: Path) -> Bench:
    return Bench(tmp_path / "driver", tmp_path, tiny_llama)


@pytest.fixture
def recipe(bench: Bench) -> str:
    return bench.recipe(variants=[{"gguf": each} for each in TYPES])


def test_whatever_is_killed_nothing_is_lost_and_nothing_is_done_twice(
    bench: Bench, recipe: str, raylets: Callable[..., Raylets]
) -> None:
    cluster, store = raylets(3, **SLOW), bench.folder / "store"
    run, names = Driver(bench, cluster, str(store)), {"base", *(f"gguf-{each}" for each in TYPES)}
    # The driver is killed when a job is at work: its steps end with it, and so do their engines.
    child = run.start("run", recipe)
    until(lambda: [*(store / "artifacts").glob("*/current.json")] and any(map(cluster.engines, range(3))))
    child.kill()
    child.communicate()
    until(lambda: not any(cluster.engines(number) or cluster.steps(number) for number in range(3)))
    before = made(store)
    # Run again, with a step killed and then a node, each in the middle of a job.
    child = run.start("run", recipe)
    killed_step = killed_node = False
    limit = time.monotonic() + 300
    while child.poll() is None and time.monotonic() < limit:
        for number in (2, 1):
            if not killed_step and cluster.engines(number) and cluster.steps(number):
                cluster.steps(number)[0].kill()
                killed_step = True
                time.sleep(1.0)
            elif killed_step and not killed_node and cluster.engines(number):
                cluster.kill(number)
                killed_node = True
        time.sleep(0.05)
    out, err = child.communicate(timeout=10)
    assert child.returncode == 0, err
    assert killed_step and killed_node and "begun again" in err
    rows = stored(store / "results")
    assert Counter(row["artifact"]["variant"] for row in rows) == dict.fromkeys(names, 1)
    assert not any(row["error"] for row in rows)
    assert set(made(store).values()) == {1} and before.items() <= made(store).items()
    assert all(variant in out for variant in names)
    # And once more: nothing is left to do.
    again = run("run", recipe)
    assert again.returncode == 0 and len(stored(store / "results")) == len(rows) and made(store) == made(store)


def test_an_engine_that_dies_leaves_a_row_with_its_error_and_the_rest_is_measured(
    bench: Bench, raylets: Callable[..., Raylets]
) -> None:
    recipe = bench.recipe(backends={"fake": {"do": "die", "only": "gguf-Q8_0"}})
    cluster, store = raylets(2, WORKBENCH_FAKE_BACKEND="1", HF_HUB_OFFLINE="1"), bench.folder / "store"
    done = Driver(bench, cluster, str(store))("run", recipe)
    rows = {row["artifact"]["variant"]: row["error"] for row in stored(store / "results")}
    assert done.returncode == 1 and rows["base"] is None and "exit code 7" in rows["gguf-Q8_0"]
    assert rows["gguf-Q8_0"].partition(" (log")[0] in done.stderr and f"{store}/results" in done.stderr


def test_a_cluster_that_does_not_answer_is_told_at_once(bench: Bench, recipe: str) -> None:
    for words, address in (
        (["--on", "ray"], f"127.0.0.1:{free_port()}"),
        (["--on", f"ray://127.0.0.1:{free_port()}"], ""),
    ):
        done = bench.typed("quantize", recipe, *words, RAY_ADDRESS=address)
        assert done.returncode == 2 and "no Ray cluster answers there" in done.stderr, done.stderr
        assert "ray start --head" in done.stderr
    assert "--on spark: ray, or ray://HOST:PORT" in bench.typed("quantize", recipe, "--on", "spark").stderr


def test_machines_are_named_by_label_and_wrong_words_are_told(
    bench: Bench, recipe: str, raylets: Callable[..., Raylets]
) -> None:
    cluster, store = raylets(3, WORKBENCH_FAKE_BACKEND="1", HF_HUB_OFFLINE="1"), bench.folder / "store"
    run = Driver(bench, cluster, str(store))
    gone = run("run", bench.recipe("gone", base={"path": "nowhere"}))
    assert gone.returncode == 2 and gone.stderr.count("nowhere") == 1, gone.stderr
    wrong = run("quantize", recipe, "--machines", "h100")
    assert wrong.returncode == 2 and "--machines h100: no machine of that kind or label" in wrong.stderr
    done = run("quantize", recipe, "--machines", "room=b")
    assert done.returncode == 0, done.stderr
    assert (cluster.home(2) / "artifacts").exists() and not (cluster.home(1) / "artifacts").exists()
    # Where it is: in the store, and with -o here.
    assert done.stdout.count(f"{store}/artifacts/") == len(TYPES)
    copied = run("quantize", recipe, "-o", str(bench.folder / "out"))
    assert copied.returncode == 0, copied.stderr
    assert {file.name for file in (bench.folder / "out").iterdir()} == {f"Tiny-{each}.gguf" for each in TYPES}


def test_a_night_of_two_recipes_is_judged_on_each_kind_of_machine(
    bench: Bench, raylets: Callable[..., Raylets]
) -> None:
    load = {"prompt_tokens": 8, "repeats": 2}
    recipes = [
        bench.recipe("a", variants=[{"gguf": "Q8_0"}], workload=load | {"new_tokens": 4}),
        bench.recipe("b", variants=[{"gguf": "Q4_0"}], workload=load | {"new_tokens": 5}),
    ]
    cluster, store = raylets(2, WORKBENCH_FAKE_BACKEND="1", HF_HUB_OFFLINE="1"), bench.folder / "store"
    done = Driver(bench, cluster, str(store))("nightly", *recipes)
    assert done.returncode == 0, done.stderr
    (notes,) = (store / "results").glob("*/nights.jsonl")
    assert [json.loads(line)["recipe"] for line in notes.read_text().splitlines()] == ["a", "b"]
    assert len(stored(store / "results")) == 4
    # The next night measures all of it anew, and makes nothing.
    before = made(store)
    again = Driver(bench, cluster, str(store))("nightly", *recipes)
    assert again.returncode == 0 and len(stored(store / "results")) == 8 and made(store) == before


@pytest.mark.timeout(1800)  # three nodes of real engines, beside another test's, on two cores
def test_the_tiny_recipe_over_three_nodes_and_s3_gives_the_rows_of_one_machine(
    bench: Bench, real_home: Path, raylets: Callable[..., Raylets], tmp_path: Path
) -> None:
    """Real engines, a real model, a real S3 server; quality equal to the last digit."""
    port = free_port()
    aws = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        bucket = (
            "import boto3, time\n"
            "for _ in range(100):\n"
            "    try: boto3.client('s3').create_bucket(Bucket='bench'); break\n"
            "    except Exception: time.sleep(0.2)\n"
        )
        subprocess.run([sys.executable, "-c", bucket], check=True, env={**os.environ, **aws}, timeout=60)
        recipe = str(ROOT / "recipes" / "tiny.yaml")
        alone = Bench(real_home, tmp_path, Path())
        assert alone.typed("run", recipe, WORKBENCH_FAKE_BACKEND="").returncode == 0
        cluster = raylets(3, HF_HUB_OFFLINE="1", **aws)
        done = Driver(bench, cluster, "s3://bench/night")(
            "run", recipe, "--results", str(tmp_path / "over"), WORKBENCH_FAKE_BACKEND="", **aws
        )
        assert done.returncode == 0, done.stderr
    finally:
        server.kill()
        server.wait()
    over = stored(tmp_path / "over")
    assert len(over) == len(qualities(over)) and qualities(over) == qualities(alone.rows())
    assert len({row["machine"]["installation"] for row in over}) == 1
