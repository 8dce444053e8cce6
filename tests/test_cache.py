"""The cache as a whole: what is in use stays, what dead runs left goes, and everything can be read through."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import Bench
from tests.command import command
from tests.places import ROOT
from workbench import cache, intact
from workbench import home as place
from workbench.errors import UserError
from workbench.records import Artifact, PreparedBase, Reference

ARTIFACT = Artifact("q", "gguf", "gguf", "m.gguf", "k", 100, 200)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh `$WORKBENCH_HOME` for every test, and a place for temporary files."""
    folder = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def python(program: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def at_work() -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that use the cache until they are ended."""
    program = "import time\nfrom workbench.cache import at_work\n"
    program += "with at_work(print): print('in', flush=True); time.sleep(600)"
    both = [python(program), python(program)]
    for child in both:
        assert child.stdout is not None and "in\n" in child.stdout  # The other may be sweeping.
    yield both
    for child in both:
        child.kill()
        child.communicate()


def write(file: Path, size: int = 1000) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * size)


def weights(folder: Path) -> Artifact:
    write(folder / "m.gguf", 1_000_000)
    return ARTIFACT


@pytest.fixture
def filled(home: Path) -> Path:
    place.entry("artifacts", "whole", Artifact, weights)
    for path in ("artifacts/half.partial/weights", "bases/half.partial/weights", "logs/one/log.txt", "states/s/x"):
        write(home / path)
    (home / "config.toml").write_text("")
    return home


def left_in(home: Path) -> set[str]:
    return {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and "locks" not in p.parts}


def test_clean_keeps_what_is_finished(filled: Path) -> None:
    assert cache.clean(everything=False) == 4000
    assert left_in(filled) == {"artifacts/whole/artifact.json", "artifacts/whole/m.gguf", "config.toml"}
    assert cache.clean(everything=False) == 0


def test_clean_all_keeps_only_the_machines_facts(filled: Path) -> None:
    size = (filled / "artifacts" / "whole" / "artifact.json").stat().st_size
    assert cache.clean(everything=True) == 1_004_000 + size
    assert left_in(filled) == {"config.toml"}


def test_clean_all_takes_every_folder_that_the_program_makes(home: Path) -> None:
    """Read off the source; prepared tasks and bandwidths were forgotten once."""
    source = "\n".join(path.read_text() for path in (ROOT / "workbench").rglob("*.py"))
    kinds = set(re.findall(r'\bentry\(\s*"(\w+)"', source))
    folders = kinds | set(re.findall(r'home\(\) / "(\w+)"', source)) - {"instance"}
    assert kinds == set(typing.get_args(place.Kind)) == cache.RECORDS.keys() and folders > kinds
    for name in folders:
        write(home / name / "one" / "file")
    (home / "mine").mkdir()
    assert cache.clean(everything=True) == 1000 * len(folders - {"locks"}), "notes in locks are not counted"
    assert {path.name for path in home.iterdir()} == {"mine", "locks"}, "and no folder of somebody else's"
    assert [path.name for path in (home / "locks").iterdir()] == ["at-work"]


@pytest.mark.parametrize("everything", [False, True])
def test_clean_refuses_while_anybody_is_at_work(
    filled: Path, at_work: list[subprocess.Popen[str]], everything: bool
) -> None:
    write(filled / "logs" / "two.partial" / "log.txt")
    before = left_in(filled)
    for child in at_work:
        with pytest.raises(UserError, match="a run is at work here. Clean when it has ended"):
            cache.clean(everything)
        assert left_in(filled) == before
        child.kill()
        child.wait()
    assert cache.clean(everything) >= 4000


def test_who_comes_while_it_is_cleaned_waits(home: Path) -> None:
    with place.lock(home / "locks" / "at-work"):
        child = python("from workbench.cache import at_work\nwith at_work(print): print('in')")
        assert child.stdout is not None and child.stdout.readline() == "waiting for the cache to be cleaned\n"
    assert child.communicate(timeout=60)[0] == "in\n"


def test_what_dead_runs_left_is_swept_at_the_next_start(home: Path, tmp_path: Path) -> None:
    program = """
import os, signal
from pathlib import Path
from workbench.cache import at_work
from workbench.home import home
from workbench.scratch import held, temporary
with at_work(print), held(home() / "logs" / "now.partial") as logs, temporary() as mine:
    (logs / "log.txt").touch()
    (mine / "socket").touch()
    print(mine, flush=True)
    input()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    mine = Path(child.stdout.readline().strip())
    assert mine.parent == tmp_path
    write(tmp_path / "workbench-notes")
    write(tmp_path / "other" / "x")
    half = ".last.999999999.partial"
    for path in (
        "logs/failed/log.txt",
        "bases/b.partial/w",
        "artifacts/a.partial/w",
        "states/s/x",
        half,
        ".my.partial",
    ):
        write(home / path)
    os.utime(home / half, (0, 0))
    with cache.at_work(print):
        assert (mine / "socket").exists() and (home / "logs" / "now.partial").exists(), "it is alive"
    child.kill()
    child.communicate()
    with cache.at_work(print):
        assert not mine.exists() and (tmp_path / "workbench-notes").exists() and (tmp_path / "other").exists()
        kept = {"logs/failed/log.txt", ".my.partial"}
        assert left_in(home) == kept | {"artifacts/a.partial/w", "states/s/x"}, "a pass can go on"
    os.utime(home / "states" / "s", (0, 0))
    with cache.at_work(print):
        assert left_in(home) == kept


def test_verify_finds_what_a_look_does_not(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place.entry("artifacts", "k", Artifact, weights)[0]
    answer = command("cache", "verify")
    assert (answer.returncode, answer.stdout) == (0, "1 entries, 1 MiB: none of them not as they were made\n")
    record, file = folder / "artifact.json", folder / "m.gguf"
    told, prints = intact.contents(record)
    assert prints is not None
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    # As a disk's fault would: no time of change tells of it.
    status = file.stat()
    was = prints["m.gguf"]
    same = intact.Print(was.size, [status.st_mtime_ns, status.st_ctime_ns], was.blocks, was.whole)
    intact.seal(record, told, {"m.gguf": same})
    assert place.stored("artifacts", "k", Artifact) == ARTIFACT
    answer = command("cache", "verify")
    assert answer.returncode == 1 and len(answer.stdout.splitlines()) == 2
    assert answer.stdout.startswith(f"{file} is not what it was when it was made: its content changed: the next run")
    assert place.stored("artifacts", "k", Artifact) is None, "found from then on"
    assert capsys.readouterr().err.count("made anew") == 1


# --- seen and removed by recipe -----------------------------------------------------------------


@pytest.fixture
def two_recipes(home: Path) -> Path:
    """What two recipes made of one base, and one of them of another."""
    for key, recipe, base in (("a", "mine", "b1"), ("b", "other", "b1"), ("c", "mine", "b2")):

        def make(folder: Path, key: str = key, recipe: str = recipe, base: str = base) -> Artifact:
            provenance = {"recipe": recipe, "base": base, "source": {"hub": base}}
            return replace(weights(folder), digest=key, variant=f"gguf-{key}", provenance=provenance)

        place.entry("artifacts", key, Artifact, make)
    for base in ("b1", "b2"):
        bare = PreparedBase(base, f"unlike {base}", "float32", 1, 4, source={"hub": base})
        place.entry("bases", f"base-{base}", PreparedBase, lambda folder, bare=bare: write(folder / bare.path) or bare)
        seen = Reference("r", base=base)
        place.entry("references", f"reference-{base}", Reference, lambda folder, seen=seen: seen)
    return home


def test_the_cache_says_what_it_holds_and_for_whom(two_recipes: Path) -> None:
    said = command("cache", "ls").stdout.splitlines()
    listed = {tuple(re.split(r" {2,}", line.strip())[2:]) for line in said[:-1]}
    assert listed == {
        ("gguf-a (gguf)", "mine"),
        ("gguf-b (gguf)", "other"),
        ("gguf-c (gguf)", "mine"),
        ("base b1", "mine, other"),
        ("base b2", "mine"),
        ("references", "mine, other"),
        ("references", "mine"),
    }
    assert re.fullmatch(rf" +2\.9 MiB  in {two_recipes}", said[-1])
    write(two_recipes / "artifacts" / "half.partial" / "weights", 3 << 20)
    assert command("cache", "ls").stdout.endswith(
        "  3.0 MiB  of unfinished work and logs: `workbench clean` removes them\n"
    )


def test_what_was_made_for_one_recipe_goes_and_what_others_use_stays(two_recipes: Path) -> None:
    assert "unknown recipe 'mien'. Did you mean 'mine'?" in command("cache", "rm", "mien").stderr
    assert re.fullmatch(r"1\.9 MiB freed\n", command("cache", "rm", "mine").stdout)
    kept = {str(path.relative_to(two_recipes)) for path in two_recipes.glob("*/*") if path.parent.name != "locks"}
    assert kept == {"artifacts/b", "bases/base-b1", "references/reference-b1"}


def test_a_recipes_file_names_it_too(two_recipes: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("base: {path: x}\nvariants: [{gguf: Q8_0}]\n")
    assert command("cache", "rm", str(file)).returncode == 0
    assert not (two_recipes / "artifacts" / "b").exists() and (two_recipes / "artifacts" / "a").exists()


def test_all_is_not_removed_unasked(two_recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = command("clean", "--all")
    assert answer.returncode == 2 and "--all removes all that was made (7 entries, " in answer.stderr
    assert "add --yes" in answer.stderr and (two_recipes / "artifacts" / "a").exists()
    for typed, code in (("n\n", 1), ("y\n", 0)):
        ours, theirs = pty.openpty()
        os.write(ours, typed.encode())
        child = subprocess.run(
            [sys.executable, "-m", "workbench.cli", "clean", "--all"],
            stdin=theirs,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        os.close(ours)
        os.close(theirs)
        assert child.returncode == code and "Remove all that was made, 7 entries, " in child.stdout + child.stderr
    assert not (two_recipes / "artifacts").exists()


@pytest.mark.slow
def test_a_run_is_not_disturbed_by_clean(bench: Bench) -> None:
    recipe = bench.recipe(workload={"prompt_tokens": 8, "new_tokens": 50, "repeats": 2})
    child = bench.start("run", recipe, WORKBENCH_FAKE_SLOWER="15")
    try:
        bench.wait_for(lambda: bool(bench.workers()), child)
        for words in (["clean"], ["clean", "--all", "--yes"], ["cache", "rm", "r"]):
            answer = bench(*words)
            assert (answer.returncode, answer.stdout) == (2, "")
            assert answer.stderr == f"error: {bench.home}: a run is at work here. Clean when it has ended\n"
        _, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err
    assert bench.measured() == ["base", "gguf-Q8_0"]
