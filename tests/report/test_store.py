"""Rows on disk: whole, in order, safe against two writers, a kill, a full disk and other versions."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.rows import a_row
from workbench.errors import UserError
from workbench.records import SCHEMA_VERSION, Machine, to_json
from workbench.report import migrate, store


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    row = a_row(warnings=["naïve | [bold]\n"], options={"threads": 2})
    store.append(tmp_path, "desk", row)
    assert (tmp_path / "desk" / "rows.jsonl").read_bytes().count(b"\n") == 1
    assert store.read(tmp_path) == ([row], [])
    assert store.read(tmp_path / "desk") == ([row], [])
    assert store.read(tmp_path / "desk" / "rows.jsonl") == ([row], [])


def test_a_rerun_supersedes_in_place_but_not_on_another_machine(tmp_path: Path) -> None:
    first, second = a_row(key="a"), a_row(key="b")
    store.append(tmp_path, "desk", first)
    store.append(tmp_path, "desk", second)
    store.append(tmp_path, "desk", replace(first, duration_s=9.0))
    store.append(tmp_path, "lab", replace(first, machine=Machine("lab")))
    rows, warnings = store.read(tmp_path)
    assert [(row.key, row.duration_s, row.machine.name) for row in rows] == [
        ("a", 9.0, "desk"),
        ("b", 3.0, "desk"),
        ("a", 3.0, "lab"),
    ]
    assert warnings == []
    assert len((tmp_path / "desk" / "rows.jsonl").read_text().splitlines()) == 3  # history stays


def test_nothing_is_written_that_is_not_json(tmp_path: Path) -> None:
    row = a_row(memory={"peak_rss": math.nan, "weights": [1.0, math.inf]})
    store.append(tmp_path, "desk", row)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    stored = json.loads((tmp_path / "desk" / "rows.jsonl").read_text(), parse_constant=refuse)
    assert stored["measurement"]["memory"] == {"peak_rss": None, "weights": [1.0, None]}


def test_half_a_line_costs_only_itself_wherever_it_was_cut(tmp_path: Path) -> None:
    store.append(tmp_path, "desk", a_row(key="a"))
    file = tmp_path / "desk" / "rows.jsonl"
    whole = file.read_bytes()
    # All of it but the end of the line is not half a line.
    for cut in range(1, len(whole) - 1, 37):
        file.write_bytes(whole + whole[:cut])
        store.append(tmp_path, "desk", a_row(key="b"))
        rows, warnings = store.read(file)
        assert [row.key for row in rows] == ["a", "b"]
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{file}:2: ")
    # All but the newline arrived: nothing is lost.
    file.write_bytes(whole[:-1])
    store.append(tmp_path, "desk", a_row(key="b"))
    assert [[row.key for row in found] for found in store.read(file)[:1]] == [["a", "b"]]
    assert store.read(file)[1] == []


@pytest.mark.parametrize(
    "line",
    [
        b"[1, 2]",
        b"7",
        b"{}",
        b"\xff\xfe",
        b'{"schema_version": true}',
        b'{"schema_version": 0}',
        b"[" * 100_000,
        b'{"schema_version": 1, "key": "k"}',
    ],
)
def test_a_bad_line_is_skipped_and_named(tmp_path: Path, line: bytes) -> None:
    store.append(tmp_path, "desk", a_row(key="a"))
    file = tmp_path / "desk" / "rows.jsonl"
    file.write_bytes(line + b"\n\n" + file.read_bytes())
    rows, warnings = store.read(tmp_path)
    assert [row.key for row in rows] == ["a"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{file}:1: not a whole row, skipped (")


@pytest.mark.parametrize(("path", "value"), [("backend", 7), ("artifact", None), ("workload", "fast"), ("key", None)])
def test_a_row_of_wrong_types_is_skipped(tmp_path: Path, path: str, value: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(to_json(a_row()) | {path: value}) + "\n")
    rows, warnings = store.read(tmp_path)
    assert rows == []
    assert len(warnings) == 1


def test_a_newer_schema_asks_to_upgrade(tmp_path: Path) -> None:
    store.append(tmp_path, "desk", a_row(key="a"))
    file = tmp_path / "desk" / "rows.jsonl"
    newer = json.dumps({"schema_version": SCHEMA_VERSION + 1, "whatever": "it became"})
    file.write_text(file.read_text() + newer + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*newer workbench.*schema {SCHEMA_VERSION + 1}.*Upgrade"):
        store.read(tmp_path)


def test_unknown_fields_of_the_same_schema_are_ignored(tmp_path: Path) -> None:
    record = to_json(a_row(key="a")) | {"added_later": {"x": 1}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    assert store.read(tmp_path) == ([a_row(key="a")], [])


def test_an_older_schema_is_migrated_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = to_json(a_row(key="a")) | {"schema_version": SCHEMA_VERSION - 1}
    old["engine"] = old.pop("backend")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(old) + "\n")

    def renamed(record: dict[str, Any]) -> dict[str, Any]:
        return {"backend" if name == "engine" else name: value for name, value in record.items()}

    monkeypatch.setitem(migrate.MIGRATIONS, SCHEMA_VERSION - 1, renamed)
    assert store.read(file) == ([a_row(key="a")], [])
    steps = {1: lambda r: r | {"a": b"1"}, 2: lambda r: r | {"b": r["a"] + b"0"}}
    assert migrate.migrate({}, 1, 3, steps) == {"a": b"1", "b": b"10", "schema_version": b"3"}
    with pytest.raises(ValueError, match="no migration from schema version 3"):
        migrate.migrate({}, 1, 4, steps)


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.rows import a_row
from workbench.report import migrate, store
row = a_row(warnings=["x" * 3000])
for number in range({count}):
    store.append(Path({results!r}), "desk", replace(row, key=f"{name}-{{number}}"))
    print(number, flush=True)
"""


def a_writer(results: Path, name: str, count: int) -> subprocess.Popen[str]:
    script = textwrap.dedent(WRITER).format(root=str(ROOT), results=str(results), name=name, count=count)
    return subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True)


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [a_writer(tmp_path, name, 200) for name in ("one", "two")]
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    rows, warnings = store.read(tmp_path)
    assert warnings == []
    keys = [row.key for row in rows]
    assert sorted(keys) == sorted(f"{name}-{number}" for name in ("one", "two") for number in range(200))
    for name in ("one", "two"):
        own = [key for key in keys if key.startswith(name)]
        assert own == [f"{name}-{number}" for number in range(200)]


def test_a_writer_waits_for_the_lock(tmp_path: Path) -> None:
    """Without it, repairing a half line and undoing a failed write would race with another writer."""
    store.append(tmp_path, "desk", a_row(key="a"))
    with (tmp_path / "desk" / "rows.jsonl").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=store.append, args=(tmp_path, "desk", a_row(key="c")))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        other.write((json.dumps(to_json(a_row(key="b"))) + "\n").encode())
    waiting.join(10)
    assert [row.key for row in store.read(tmp_path)[0]] == ["a", "b", "c"]


def test_a_killed_writer_loses_nothing_it_reported(tmp_path: Path) -> None:
    reported = []
    for turn in range(3):
        writer = a_writer(tmp_path, f"turn{turn}", 1_000_000)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.1 + 0.03 * turn)
        writer.send_signal(signal.SIGKILL)
        reported += [f"turn{turn}-0", *(f"turn{turn}-{line.strip()}" for line in writer.stdout if line.endswith("\n"))]
        writer.wait(timeout=10)
    store.append(tmp_path, "desk", a_row(key="after"))
    rows, warnings = store.read(tmp_path)
    assert len(warnings) <= 3
    assert rows[-1].key == "after"
    assert {row.key for row in rows} >= set(reported)
    assert len(reported) > 6


def test_a_full_disk_is_a_clear_line_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    store.append(tmp_path, "desk", a_row(key="a"))
    file = tmp_path / "desk" / "rows.jsonl"
    before = file.read_bytes()
    script = WRITER.replace(
        "for number",
        f"import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 500},) * 2)\nfor number",
    ).format(root=str(ROOT), results=str(tmp_path), name="b", count=1)
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"UserError: {file}: cannot store a row (" in done.stderr
    assert file.read_bytes() == before


def test_a_folder_without_permission_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    monkeypatch.chdir(tmp_path)
    me = os.geteuid()
    if me == 0:  # root may write everywhere, and others may not even enter the folders above: so from within
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot store a row \(.*Permission denied"):
            store.append(Path("results"), "desk", a_row())
    finally:
        os.seteuid(me)


def test_a_results_path_that_is_a_file_is_a_clear_line(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="results/desk.*cannot store a row"):
        store.append(tmp_path / "results", "desk", a_row())
    with pytest.raises(UserError, match="results/desk.*cannot store a row"):
        store.try_writing(tmp_path / "results", "desk")


def test_trying_leaves_no_row_and_no_file(tmp_path: Path) -> None:
    store.try_writing(tmp_path / "results", "desk")
    assert not list(tmp_path.iterdir())
    store.append(tmp_path, "desk", a_row())
    before = (tmp_path / "desk" / "rows.jsonl").read_bytes()
    store.try_writing(tmp_path, "desk")
    assert [(file.name, file.read_bytes()) for file in (tmp_path / "desk").iterdir()] == [("rows.jsonl", before)]
    (tmp_path / "other" / "rows.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="other/rows.jsonl: cannot store a row"):
        store.try_writing(tmp_path, "other")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../up"])
def test_a_machine_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a folder"):
        store.append(tmp_path / "results", name, a_row())
    assert list(tmp_path.iterdir()) == []


def test_missing_paths(tmp_path: Path) -> None:
    assert store.read(tmp_path / "nothing-yet") == ([], [])
    with pytest.raises(UserError, match=r"rows\.jsonl: no such file"):
        store.read(tmp_path / "rows.jsonl")
