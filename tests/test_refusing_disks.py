"""Places that refuse: one line each, exit code 2, nothing half done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.places import ROOT
from workbench import home as place
from workbench.records import Artifact

RECIPE = "base: {path: %s}\nmodel: Tiny\nvariants: [{gguf: Q8_0}]\nbackends: {llamacpp: {}}\n"
NOBODY = 65534
Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def mortal() -> list[str]:
    """Words before a command that make it obey the rights of files, as root does not."""
    if os.geteuid() != 0:
        return []
    words = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]
    if not shutil.which("setpriv") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("root's rights cannot be dropped here")
    return words


@pytest.fixture
def typed(tmp_path: Path, mortal: list[str]) -> Typed:
    """`workbench WORDS` in a shell, with a home and temporary files of its own; `after`: what follows the command."""

    def run(*words: str, after: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        own = {"WORKBENCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        line = f'"$@" {after}'
        command = [*mortal, "sh", "-c", line, "sh", sys.executable, "-m", "workbench.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own, **more}, cwd=tmp_path)

    return run


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Path) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE % tiny_llama)
    return str(tmp_path / "r.yaml")


def refused(answer: subprocess.CompletedProcess[str]) -> str:
    assert (answer.returncode, answer.stdout) == (2, ""), answer
    (line,) = answer.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "words", [["quantize"], ["run"], ["nightly"], ["clean", "--all"], ["cache", "verify"]], ids=lambda words: words[0]
)
def test_a_home_that_may_only_be_read(typed: Typed, tmp_path: Path, recipe: str, words: list[str]) -> None:
    (tmp_path / "home" / "logs").mkdir(parents=True)
    (tmp_path / "home").chmod(0o555)
    line = refused(typed(*words, *([recipe] if len(words) == 1 else [])))
    assert f"{tmp_path}/home" in line and "Permission denied. Set WORKBENCH_HOME to a folder of yours" in line
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["logs"]


def test_a_home_that_is_a_file(typed: Typed, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "home").touch()
    assert "Set WORKBENCH_HOME to a folder of yours" in refused(typed("quantize", recipe))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("name", ["locks/at-work", "config.toml"])
def test_another_users_file_in_the_home(typed: Typed, tmp_path: Path, recipe: str, name: str) -> None:
    file = tmp_path / "home" / name
    file.parent.mkdir(parents=True)
    file.write_text("")
    file.chmod(0o600)
    os.chown(file, NOBODY, NOBODY)
    answer = typed("doctor" if name == "config.toml" else "clean")
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1
    assert answer.stderr.startswith(f"error: {file}: ") and "Permission denied" in answer.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_another_users_lock_of_the_machine_stops_nobody(tmp_path: Path, mortal: list[str], mode: int) -> None:
    """Where it can be opened it is shared; else there is one of the home."""
    tmp_path.chmod(0o1777)
    file = tmp_path / "workbench.lock"
    file.touch()
    file.chmod(mode)
    os.chown(file, NOBODY, NOBODY)
    os.chown(tmp_path, NOBODY, NOBODY)  # As the kernel asks before it protects files in such a folder.
    program = (
        "from workbench.home import machine_lock\n"
        "with machine_lock(lambda who: print('waiting', flush=True)): print('in', flush=True)"
    )
    own = {"WORKBENCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    (tmp_path / "home").mkdir()
    with place.lock(file):
        child = subprocess.Popen(
            [*mortal, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, **own}
        )
        assert child.stdout is not None
        assert child.stdout.readline() == ("in\n" if mode == 0o600 else "waiting\n")
    child.communicate(timeout=60)
    assert child.returncode == 0


def test_everybody_may_open_the_machines_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0o077)
    with place.machine_lock():
        os.umask(before)
    assert (tmp_path / "workbench.lock").stat().st_mode & 0o777 == 0o666


def test_a_record_that_may_not_be_read_is_made_anew(
    tmp_path: Path, mortal: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    folder, _ = place.entry("artifacts", "k", Artifact, lambda _: Artifact("q", "m", "f", "", "k", 1, 2))
    (folder / "artifact.json").chmod(0)
    program = "from workbench.home import stored; from workbench.records import Artifact\n"
    program += "print(stored('artifacts', 'k', Artifact))"
    answer = subprocess.run(
        [*mortal, sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert answer.stdout == "None\n"
    (line,) = answer.stderr.splitlines()
    assert "artifact.json cannot be read (Permission denied): made anew" in line


NO_TMP = """
for each in /tmp /var/tmp /usr/tmp; do [ ! -d $each ] || mount -t tmpfs -o ro tmpfs $each || exit 77; done
cd /proc && exec "$@"
"""


def test_no_place_for_temporary_files(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the engines would need; the home and the program lie elsewhere."""
    if not str(ROOT).startswith(("/tmp", "/var/tmp")) and shutil.which("unshare"):
        program = "from workbench.scratch import temporary\nfrom workbench.console import command\ncommand(temporary)"
        own = [] if os.geteuid() == 0 else ["--map-root-user"]
        answer = subprocess.run(
            ["unshare", *own, "--mount", "sh", "-c", NO_TMP, "sh", sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": "/nowhere", "PYTHONPATH": str(ROOT)},
        )
        if "permitted" in answer.stderr or answer.returncode == 77:
            pytest.skip("mounting is not permitted here")
        assert "set TMPDIR to one of yours" in refused(answer)
    else:
        pytest.skip("no namespace of mounts here")


def test_a_terminal_that_knows_no_letters_but_ascii(typed: Typed, tmp_path: Path) -> None:
    plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "häuser").touch()
    answer = typed("table", str(tmp_path / "häuser" / "ü"), **plain)
    assert answer.returncode == 2 and "Traceback" not in answer.stderr
    answer = typed("clean", **plain, WORKBENCH_HOME=str(tmp_path / "häuser"))
    assert "h\\udcc3\\udca4user" in refused(answer)


@pytest.mark.parametrize("words", [["schema"], ["--version"], ["clean"]], ids=lambda words: words[0])
def test_an_output_that_is_full_closed_or_left(typed: Typed, words: list[str]) -> None:
    for after, code, told in (
        (">/dev/full", 2, "error: standard output: No space left on device."),
        (">&-", 2, "error: standard output is closed."),
        ("2>&- >&-", 2, ""),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
    ):
        answer = typed(*words, after=after)
        assert answer.returncode == code, (after, answer)
        assert answer.stderr.startswith(told) and len(answer.stderr.splitlines()) == bool(told), (after, answer)


def test_a_pipe_that_nobody_reads(typed: Typed) -> None:
    """As a program ends that a signal ends: without a word."""
    for words in (["schema"], ["--version"]):
        reading, writing = os.pipe()
        os.close(reading)
        child = subprocess.Popen(
            [sys.executable, "-m", "workbench.cli", *words], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        os.close(writing)
        assert child.communicate(timeout=60)[1] == "" and child.returncode == 141
