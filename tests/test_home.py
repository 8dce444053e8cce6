"""The cache: made once, whole or not there, shared by several runs, clear when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.places import ROOT
from tests.rows import a_row
from workbench import home as place
from workbench.errors import UserError
from workbench.profile.measure import portable_row
from workbench.records import Cost


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh `$WORKBENCH_HOME` for every test."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    return folder


def python(program: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_where_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.home() == home
    monkeypatch.delenv("WORKBENCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    if sys.platform == "linux":
        assert place.home() == Path("/somewhere/cache/workbench")


def test_what_is_published_names_no_folder_of_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/someone")
    assert place.portable(f"{home}/a in {home}, /someone/b") == "$WORKBENCH_HOME/a in $WORKBENCH_HOME, ~/b"
    assert place.portable(f"{home}-2 and /someone.else") == f"{home}-2 and /someone.else"
    monkeypatch.setenv("HOME", "/")
    assert place.portable("/a/b") == "/a/b"


@pytest.mark.parametrize("name", ["a b", 'o\'brien "x"', "höme ★", "back\\slash", "50%", "$x;y", "[a-z]*"])
@pytest.mark.parametrize("under", ["home", "cache"])
def test_a_row_names_no_folder_however_its_home_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, under: str
) -> None:
    own = tmp_path / name
    monkeypatch.setenv("HOME", str(own if under == "home" else tmp_path / "other"))
    monkeypatch.setenv("WORKBENCH_HOME", str(own / "cache"))
    path = str(own / "cache" / "artifacts" / "x y.gguf")
    row = a_row(error=f"{path!r}: no; {json.dumps(path)}; {shlex.quote(path)}; file://{quote(path)} in {own}/cache")
    source = {"path": str(own / "models" / "m"), "files": [str(own / "cache")]}
    artifact = replace(row.artifact, path=path, provenance={"source": source}, warnings=[f"kept in {path}"])
    row = replace(row, artifact=artifact, options={"extra": {"deep": [path]}})
    told = portable_row(row)
    assert told.artifact.path == "$WORKBENCH_HOME/artifacts/x y.gguf" == told.options["extra"]["deep"][0]
    assert place.local(told.artifact.path) == Path(path)
    assert told.error is not None and told.error.count("$WORKBENCH_HOME") == 5
    if under == "home":
        assert told.artifact.provenance["source"]["path"] == "~/models/m"
        assert place.local("~/models/m") == own / "models" / "m"
    kept = [told.error, *told.artifact.warnings, told.artifact.path, told.options["extra"]["deep"][0]]
    assert not any(name in text or repr(name)[1:-1] in text for text in kept)


def test_asking_makes_nothing(home: Path) -> None:
    assert place.last_recipe() is None
    assert place.interpreter("vllm", "python") == "python"
    assert not home.exists()


# --- entries ------------------------------------------------------------------------------------


def test_an_entry_is_made_once(home: Path) -> None:
    made = []

    def make(folder: Path) -> dict[str, Any]:
        assert folder.name == "k.partial", "unfinished work never has the final name"
        (folder / "weights").write_text("w")
        made.append(folder)
        return {"n": len(made)}

    first = place.entry("artifacts", "k", dict, make)
    assert first == place.entry("artifacts", "k", dict, make) == (home / "artifacts" / "k", {"n": 1})
    assert sorted(p.name for p in first[0].iterdir()) == ["artifact.json", "weights"]
    assert [p.name for p in (home / "artifacts").iterdir()] == ["k"]


def test_two_processes_make_it_once(home: Path, tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from workbench.home import entry
def make(folder):
    with open({str(tmp_path / "made")!r}, "a") as file: file.write("x")
    time.sleep(0.5)
    return {{"by": os.getpid()}}
print(entry("bases", "k", dict, make)[1]["by"])
"""
    both = [python(program), python(program)]
    answers = {child.communicate(timeout=60)[0].strip() for child in both}
    assert [child.returncode for child in both] == [0, 0]
    assert len(answers) == 1 and int(answers.pop()) in {child.pid for child in both}
    assert (tmp_path / "made").read_text() == "x"


def test_failed_work_leaves_no_entry_and_is_taken_up_again(home: Path) -> None:
    def breaks(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("done so far")
        raise RuntimeError("in the middle")

    def resumes(folder: Path) -> dict[str, Any]:
        return {"found": (folder / "half").read_text()}

    with pytest.raises(RuntimeError, match="in the middle"):
        place.entry("artifacts", "k", dict, breaks)
    assert not (home / "artifacts" / "k").exists()
    folder, record = place.entry("artifacts", "k", dict, resumes)
    assert record == {"found": "done so far"} and (folder / "half").exists()


def test_a_folder_without_its_record_is_made_again(home: Path) -> None:
    """Such as one that somebody restored by halves."""
    (home / "artifacts" / "k").mkdir(parents=True)
    assert place.entry("artifacts", "k", dict, lambda folder: {"n": 1})[1] == {"n": 1}


@pytest.mark.parametrize("text", ["", '{"seconds": 1', "[1]", '{"sec', '{"minutes": 1}', "\x00"])
def test_a_record_that_cannot_be_read_is_as_good_as_none(home: Path, text: str) -> None:
    folder, first = place.entry("artifacts", "k", Cost, lambda folder: Cost(1.0))
    assert place.stored("artifacts", "k", Cost) == first == Cost(1.0)
    (folder / "artifact.json").write_text(text)
    assert place.stored("artifacts", "k", Cost) is None and place.stored("artifacts", "other", Cost) is None
    assert place.entry("artifacts", "k", Cost, lambda folder: Cost(2.0)) == (folder, Cost(2.0))
    assert place.stored("artifacts", "k", Cost) == Cost(2.0)


def test_a_killed_maker_leaves_nothing_finished_and_no_lock(home: Path, tmp_path: Path) -> None:
    program = f"""
import time
from pathlib import Path
from workbench.home import entry
def make(folder):
    (folder / "half").write_text("x")
    Path({str(tmp_path / "here")!r}).touch()
    time.sleep(600)
entry("bases", "k", dict, make)
"""
    child = python(program)
    limit = time.monotonic() + 20
    while not (tmp_path / "here").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    child.kill()
    child.communicate()
    assert not (home / "bases" / "k").exists()
    assert place.entry("bases", "k", dict, lambda folder: {"half": (folder / "half").exists()})[1] == {"half": True}


FILLS_IT = """
from workbench import home as place
from workbench.errors import UserError

def make(folder):
    (folder / "weights").write_bytes(b"x" * 1_000_000)
    return {}

place.entry("artifacts", "small", dict, lambda folder: {"n": 1})
try:
    place.entry("artifacts", "k", dict, make)
except UserError as error:
    print(error)
assert place.entry("artifacts", "small", dict, make)[1] == {"n": 1}, "finished work is kept"
"""


def test_a_full_disk_is_told_in_one_line(home: Path, small_disk: Callable[[Path, str], list[str]]) -> None:
    """A file system of 256 KiB, and 1 MB to be written to it."""
    home.mkdir()
    command = [*small_disk(home, "256k"), sys.executable, "-c", FILLS_IT]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    (told,) = done.stdout.splitlines()
    assert re.search("the disk is full .* set WORKBENCH_HOME to a larger disk", told)
    assert (home / "artifacts" / "small").exists() and not (home / "artifacts" / "k").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_where_none_can_be_mounted(number: int) -> None:
    def make(folder: Path) -> dict[str, Any]:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match="the disk is full"):
        place.entry("artifacts", "k", dict, make)


def test_other_errors_pass_as_they_are() -> None:
    def make(folder: Path) -> dict[str, Any]:
        raise FileNotFoundError(errno.ENOENT, "no such thing")

    with pytest.raises(FileNotFoundError):
        place.entry("artifacts", "k", dict, make)


# --- locks --------------------------------------------------------------------------------------


def test_who_waits_is_told_once(tmp_path: Path) -> None:
    path, said = tmp_path / "locks" / "one", []
    program = f"""
import time
from pathlib import Path
from workbench.home import lock
with lock(Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(0.5)
"""
    child = python(program)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with place.lock(path, lambda: said.append("waiting")):
        assert child.wait(timeout=20) == 0, "the other one has left"
    child.communicate()
    with place.lock(path, lambda: said.append("waiting again")):
        pass
    assert said == ["waiting"]


def test_one_machine_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its home: a measurement is disturbed by anything else on the machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # Not the lock of a run that is going on.
    program = (
        "from workbench.home import machine_lock\n"
        "with machine_lock(lambda who: print('waiting', flush=True)): print('in', flush=True)"
    )
    with place.machine_lock():
        child = python(program, WORKBENCH_HOME=str(tmp_path / "other"), TMPDIR=str(tmp_path))
        assert child.stdout is not None and child.stdout.readline() == "waiting\n"
    assert child.communicate(timeout=60)[0] == "in\n"


def test_who_waits_for_what_another_makes_is_told(home: Path) -> None:
    program = (
        "from workbench.home import entry\n"
        "from workbench.records import Artifact\n"
        "entry('artifacts', 'k', Artifact, lambda _: Artifact('q', 'm', 'f', '', 'k', 1, 2))"
    )
    with place.lock(home / "locks" / "artifacts-k", note=place.who("gguf-Q8_0")):
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WORKBENCH_HOME": str(home)},
        )
        assert child.stderr is not None
        said = child.stderr.readline()
    assert said.startswith(f"waiting for another workbench run, which makes the same: pid {os.getpid()}, `")
    assert said.endswith(", at gguf-Q8_0\n") and child.communicate(timeout=60)[1] == "" and child.returncode == 0


# --- the machine's facts ------------------------------------------------------------------------


def test_the_installations_name_stays(home: Path) -> None:
    name = place.installation()
    assert len(name) == 6 and int(name, 16) >= 0
    assert place.installation() == name
    assert [p.name for p in home.iterdir()] == ["instance"]


@pytest.mark.parametrize("text", [b"", b"../..", b"\xff\x00", b"abcdef7"])
def test_a_name_that_is_none_is_made_anew(home: Path, text: bytes) -> None:
    home.mkdir()
    (home / "instance").write_bytes(text)
    name = place.installation()
    assert len(name) == 6 and int(name, 16) >= 0 and place.installation() == name
    (home / "last-recipe").write_bytes(text)
    assert (place.last_recipe() is None) == (not text)


def test_two_processes_agree_on_the_installations_name() -> None:
    children = [python("from workbench.home import installation; print(installation())") for _ in range(4)]
    names = {child.communicate(timeout=60)[0].strip() for child in children}
    assert len(names) == 1 and len(names.pop()) == 6


def test_the_interpreter_of_a_backend(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir()
    (home / "config.toml").write_text('[python]\nvllm = "/opt/vllm/bin/python"\n')
    assert place.interpreter("vllm", "mine") == "/opt/vllm/bin/python"
    assert place.interpreter("llamacpp", "mine") == "mine"
    monkeypatch.setenv("WORKBENCH_PYTHON_VLLM", "/elsewhere/python")
    assert place.interpreter("vllm", "mine") == "/elsewhere/python", "the environment wins"


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[python\nvllm = 1", "not valid TOML"),
        (b"python = [", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
        (b'python = "/usr/bin/python"', r"\[python\] holds one line a backend"),
        (b"[python]\nvllm = 3", r"\[python\] holds one line a backend, such as vllm = "),
    ],
)
def test_a_bad_config_is_one_line(home: Path, text: bytes, message: str) -> None:
    home.mkdir()
    (home / "config.toml").write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        place.interpreter("vllm", "mine")
    assert str(caught.value).startswith(str(home / "config.toml"))
    assert "\n" not in str(caught.value)


def test_the_last_recipe_is_remembered_by_its_full_path(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place.remember(Path("mine.yaml"))
    monkeypatch.chdir("/")
    assert place.last_recipe() == tmp_path / "mine.yaml"
    assert [p.name for p in home.iterdir()] == ["last-recipe"]
