"""Names, paths and numbers given on the command line or in the environment: wrong ones are one line and exit code 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.command import command
from tests.places import ROOT
from workbench.errors import UserError, did_you_mean, short

LONG = "n" * 300
NOBODY = "~nobody-here/x"
SHAPE = str(ROOT / "recipes" / "llama8b-shape.yaml")


def refused(folder: Path, *words: str, **environment: str) -> str:
    own = {**os.environ, "WORKBENCH_HOME": str(folder / "home"), **environment}
    answer = command(*words, folder=folder, environment=own)
    assert answer.returncode == 2, answer
    assert answer.stdout == "" and answer.stderr.count("\n") == 1 and answer.stderr.rstrip("\n").isprintable()
    return answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["table", NOBODY],
        ["table", "--results", NOBODY],
        ["run", SHAPE, "--results", NOBODY],
        ["plan", NOBODY],
        ["compare", NOBODY, "2026-11-20"],
        ["table", "-o", NOBODY],
        ["report", "-o", NOBODY],
        ["publish", NOBODY],
        ["nightly", SHAPE, "--site", NOBODY],
    ],
    ids=lambda words: " ".join(words).replace(SHAPE, "RECIPE"),
)
def test_the_folder_of_nobody(tmp_path: Path, words: list[str]) -> None:
    assert "~nobody-here/x: nobody of that name has a folder here" in refused(tmp_path, *words)
    assert not list(tmp_path.glob("~*"))


@pytest.mark.parametrize("command_", [["clean"], ["plan", SHAPE], ["run", SHAPE]], ids=lambda words: words[0])
def test_a_cache_folder_that_cannot_be(tmp_path: Path, command_: list[str]) -> None:
    assert "nobody of that name" in refused(tmp_path, *command_, WORKBENCH_HOME="~nobody-here")
    said = refused(tmp_path, *command_, WORKBENCH_HOME=f"/tmp/{LONG}")
    assert said.startswith("error: WORKBENCH_HOME=/tmp/nnn") and "File name too long" in said and len(said) < 200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", LONG], "cannot be read as text: File name too long"),
        (["plan", SHAPE, "--device", LONG], "unknown device 'nnn"),
        (["plan", SHAPE, "--memory", LONG], "write a size with its unit"),
        (["plan", SHAPE, "--memory", "9" * 400 + "GiB"], "write a size with its unit"),
        (["plan", SHAPE, "--batch", "9" * 400], "at least 1, and at most 16,777,216"),
        (["plan", SHAPE, "--context", str(2**24 + 1)], "at least 1, and at most 16,777,216"),
        (["run", SHAPE, "--backend", LONG], "unknown backend 'nnn"),
        (["run", SHAPE, "--variant", LONG], "unknown variant 'nnn"),
        (["compare", LONG, LONG], "nothing measured yet"),
        (["table", "--format", LONG], "unknown format 'nnn"),
        (["table", "--format", "parket"], "unknown format 'parket'. Did you mean 'parquet'?"),
        (["recommend", "--min-decode", "-5"], "--min-decode -5: a limit is zero or more"),
        (["recommend", "--min-prefill", "nan"], "--min-prefill nan: a limit is zero or more"),
        (["recommend", "--max-kld", "-0.1"], "--max-kld -0.1: a limit is zero or more"),
    ],
    ids=lambda words: " ".join(words)[-40:] if isinstance(words, list) else None,
)
def test_words_of_any_length(tmp_path: Path, words: list[str], said: str) -> None:
    answer = refused(tmp_path, *words)
    assert said in answer and len(answer.replace(str(ROOT), "")) < 300


def test_a_plan_for_more_sequences_than_an_engine_takes_says_so(tmp_path: Path) -> None:
    own = {**os.environ, "WORKBENCH_HOME": str(tmp_path / "home")}
    answer = command("plan", SHAPE, "--batch", "257", "--context", "32", "--memory", "999TiB", environment=own)
    assert answer.returncode == 0 and "llamacpp takes 256 sequences at once at most" in answer.stdout


def test_a_message_is_one_line_that_steers_no_terminal() -> None:
    assert str(UserError("a\nb\x1b[31m\ud800\t\u2028c é")) == "a b\\x1b[31m\\ud800  c é"


def test_long_words_are_cut_in_the_middle() -> None:
    assert short("x" * 60) == "x" * 60
    assert short("a" * 100 + "b" * 100) == "a" * 40 + "..." + "b" * 17
    assert len(did_you_mean("?", [f"name-{number}" for number in range(1000)])) < 170
    assert did_you_mean("?", ["b", "a"]) == "Known: a, b."
