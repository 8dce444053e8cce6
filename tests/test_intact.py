"""What was cut, zeroed or edited since it was made is found before it is used, and made anew or refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fuzz
from workbench import home as place
from workbench import intact
from workbench.errors import UserError
from workbench.home import Kind
from workbench.records import (
    Artifact,
    Bandwidth,
    Cost,
    Evaluation,
    GramMatrices,
    ImportanceMatrix,
    PreparedBase,
    Prices,
    Reference,
    Task,
    Tasks,
    TokenSets,
)

COST = Cost(1.5, 2**30, {"peak_rss": 2**30}, {"others_cores": 0.1, "throttled": None})
RECORDS: dict[Kind, Any] = {
    "artifacts": Artifact(
        "awq", "awq", "awq", "m-awq", "k", 100, 200, warnings=["a warning"], provenance={"seconds": {"total": 1.5}}
    ),
    "bandwidth": Bandwidth(1.5e10),
    "bases": PreparedBase(
        "m", "0" * 64, "float32", 200, 800, "LlamaForCausalLM", 354, 2048, source={"path": "/m"}, cost=COST
    ),
    "grams": GramMatrices("k", "t", cost=COST),
    "imatrix": ImportanceMatrix("k", "t", cost=COST),
    "prices": Prices("k", "t", {"forward": 1.5}, COST),
    "references": Reference("d", {"dtype": "float32"}, "b", "e", cost=COST),
    "tasks": Tasks({"t": Task("t", "t.json", "d", 3, 40)}, text_version=1, cost=COST),
    "tokens": TokenSets(
        {"evaluation": Evaluation("e", "e.json", "d", 64, "all", 3, 100, 400)}, text_version=1, cost=COST
    ),
}
"""A record of each kind; the files that it names are made by `made`."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    return folder


def made(kind: Kind = "artifacts", content: bytes = os.urandom(200_000)) -> Path:
    """An entry with a file of weights in a folder; the file."""
    record = RECORDS[kind]
    name = getattr(record, "path", "") or "m"

    def make(folder: Path) -> Any:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "weights").write_bytes(content)
        (folder / name / "config.json").write_text("{}")
        return record

    return place.entry(kind, "k", type(record), make)[0] / name / "weights"


def found(kind: Kind = "artifacts") -> tuple[Any, list[str]]:
    """What the cache gives for it, and what it says."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        record = place.stored(kind, "k", type(RECORDS[kind]))
    return record, said.getvalue().splitlines()


def rewrite(file: Path, content: bytes, times: bool = False) -> None:
    """`times`: as they were, as far as a program can set them."""
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.write(content)
        stream.truncate()
    if times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(file: Path) -> None:
    rewrite(file, file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    rewrite(file, b"")


def zeroed_tail(file: Path) -> None:
    rewrite(file, file.read_bytes()[:-100_000] + bytes(100_000), times=True)


def one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[77_777] ^= 4
    rewrite(file, bytes(content), times=True)


def gone(file: Path) -> None:
    file.unlink()


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replaced(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(os.urandom(file.stat().st_size))
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)


FAULTS = [cut, emptied, zeroed_tail, one_bit, gone, a_folder, a_pipe, replaced]


@pytest.mark.parametrize(
    "kind, fault", [("artifacts", fault) for fault in FAULTS] + [(kind, cut) for kind in RECORDS if kind != "artifacts"]
)
def test_a_spoiled_file_is_found_told_and_made_anew(kind: Kind, fault: Callable[[Path], None]) -> None:
    file = made(kind)
    content = file.read_bytes()
    assert found(kind) == (RECORDS[kind], [])
    fault(file)
    record, said = found(kind)
    assert record is None and len(said) == 1
    assert said[0].startswith(f"warning: {file} ") and said[0].endswith(": made anew")
    assert made(kind, content) == file and file.read_bytes() == content
    assert found(kind) == (RECORDS[kind], [])


def test_a_power_cut_that_leaves_the_times_is_found_by_a_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program sets the inode's time back, so here the check is told that it is what it was."""
    file = made()
    zeroed_tail(file)
    record = file.parents[1] / "artifact.json"
    told, prints = intact.contents(record)
    assert prints is not None
    status, was = file.stat(), prints["m-awq/weights"]
    as_if = intact.Print(was.size, [status.st_mtime_ns, status.st_ctime_ns], was.blocks, was.whole)
    assert intact.change(file, as_if)[0] == "its content changed"
    for hole in range(0, was.size - was.size // 14, 9999):
        content = bytearray(b"x" * was.size)
        content[hole : hole + was.size // 14] = bytes(was.size // 14)
        file.write_bytes(b"x" * was.size)
        whole = intact.print_of(file)
        file.write_bytes(content)
        status = file.stat()
        as_if = intact.Print(was.size, [status.st_mtime_ns, status.st_ctime_ns], whole.blocks, whole.whole)
        assert intact.change(file, as_if)[0] == "its content changed", hole


def test_files_that_were_only_copied_are_read_once_and_then_believed(home: Path, tmp_path: Path) -> None:
    file = made()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    reads: list[int] = []
    record = file.parents[1] / "artifact.json"
    before = record.read_text()
    assert found() == (RECORDS["artifacts"], [])
    assert record.read_text() != before
    _, prints = intact.contents(record)
    assert prints is not None and intact.change(file, prints["m-awq/weights"]) == (None, prints["m-awq/weights"])
    assert not reads


def test_records_without_checksums_get_some_when_they_are_used() -> None:
    """Those of older caches: nothing is made anew."""
    file = made()
    record = file.parents[1] / "artifact.json"
    plain = json.loads(record.read_text())
    del plain["sealed"]
    record.write_text(json.dumps(plain))
    assert found() == (RECORDS["artifacts"], [])
    assert json.loads(record.read_text())["sealed"]["files"].keys() == {"m-awq/weights", "m-awq/config.json"}
    one_bit(file)
    assert found()[0] is None


def test_somebody_elses_files_are_refused_by_name(tmp_path: Path) -> None:
    """A base that is used where it lies cannot be made anew."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "notes.md"):
        (model / name).write_bytes(os.urandom(5000))
    base = PreparedBase(str(model), "0" * 64, "float32", 1, 4)
    place.entry("bases", "k", PreparedBase, lambda folder: base)
    (model / "notes.md").write_text("mine")
    assert place.stored("bases", "k", PreparedBase) == base
    rewrite(model / "model.safetensors", bytes(5000), times=True)
    for _ in range(2):
        with pytest.raises(UserError, match=r"model/model\.safetensors is not what it was .* Restore it"):
            place.stored("bases", "k", PreparedBase)
    (model / "model.safetensors").unlink()
    record, said = found("bases")
    assert record is None and len(said) == 1


@pytest.mark.parametrize("fault", [a_folder, a_pipe, gone, emptied])
def test_a_record_that_cannot_be_read_is_told_and_made_anew(fault: Callable[[Path], None]) -> None:
    record = made().parents[1] / "artifact.json"
    fault(record)
    told, said = found()
    assert told is None and len(said) == 1 and str(record) in said[0]
    assert made().is_file() and found()[0]


@pytest.mark.parametrize("what", ["file", "pipe", "link"])
@pytest.mark.parametrize("name", ["k", "k.partial"])
def test_an_entry_that_is_no_folder(home: Path, name: str, what: str) -> None:
    (home / "artifacts").mkdir(parents=True)
    path = home / "artifacts" / name
    {"file": path.touch, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}[what]()
    assert made().is_file()


def test_changed_records_are_taken_for_what_they_were_or_not_at_all() -> None:
    """`WORKBENCH_MUTANTS=10000` for a long run."""
    for kind, record in RECORDS.items():
        file = made(kind, b"weights").parents[1] / place.record_name(kind)
        sealed = json.loads(file.read_text())
        texts = [mutant.text for mutant in fuzz.mutants([sealed], fuzz.how_many(350) // len(RECORDS), seed=12)]
        for text in [b"", b"null", b"[]", b"7", b'{"a": ', b"\xff\xfe", b'"sealed"', b"[" * 100_000, *texts]:
            file.write_bytes(text)
            try:
                assert intact.as_made(file, type(record)) == record, text[:500]
            except intact.Changed as fault:
                assert str(fault).startswith(str(file)) and "\n" not in str(fault), text[:500]
        file.write_text(json.dumps(sealed))
        assert intact.as_made(file, type(record)) == record
