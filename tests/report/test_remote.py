"""Rows in object storage and in every other place that fsspec reaches; a real S3 server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import fsspec
import pytest

from tests.command import command
from tests.places import ROOT
from tests.rows import a_row
from workbench.errors import UserError
from workbench.report import remote, store


@pytest.fixture
def bucket() -> Iterator[str]:
    """A place in memory: what object storage is, but for the network."""
    name = f"memory://{uuid.uuid4().hex}/results"
    yield name
    remote._written.clear()


def files(url: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(url)
    return sorted(system.find(path))


def test_rows_come_back_in_order_and_one_process_keeps_one_file(bucket: str) -> None:
    for number in range(5):
        store.append(bucket, "desk", a_row(key=str(number)))
    store.append(bucket, "lab", a_row(key="0", machine="lab"))
    rows, warnings = store.read(bucket)
    assert [(store.machine_of(row), row.key) for row in rows] == [
        *(("desk", str(n)) for n in range(5)),
        ("lab", "0"),
    ]
    assert warnings == []
    assert len(files(bucket)) == 2
    assert store.read(store.under(bucket, "lab"))[0] == [a_row(key="0", machine="lab")]
    (file,) = files(f"{bucket}/lab")
    assert store.read(f"memory://{file}")[0] == [a_row(key="0", machine="lab")]


def test_trying_leaves_no_file(bucket: str) -> None:
    store.try_writing(bucket, "desk")
    assert files(bucket) == []


def test_two_writers_never_share_a_file(bucket: str) -> None:
    store.append(bucket, "desk", a_row(key="a"))
    remote._written.clear()  # as another process would begin
    store.append(bucket, "desk", a_row(key="b", started_at="2026-11-22T10:00:00Z"))
    assert len(files(bucket)) == 2
    assert [row.key for row in store.read(bucket)[0]] == ["a", "b"]


def test_a_writer_killed_between_upload_and_removal_leaves_every_row_once(bucket: str) -> None:
    store.append(bucket, "desk", a_row(key="a"))
    (old,) = files(bucket)
    system, _ = fsspec.core.url_to_fs(bucket)
    kept = system.cat_file(old)
    store.append(bucket, "desk", a_row(key="b"))
    system.pipe_file(old, kept)  # the removal never came
    assert [row.key for row in store.history(bucket)[0]] == ["a", "b"]
    # And one killed in the middle of an upload, where uploads are not all or nothing.
    system.pipe_file(old.replace("rows-2026", "rows-2027"), kept + kept[: len(kept) // 2])
    rows, warnings = store.read(bucket)
    assert [row.key for row in rows] == ["a", "b"]
    assert len(warnings) == 1 and "not a whole row" in warnings[0]


def test_a_large_file_is_followed_by_another(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SEGMENT_BYTES", 3000)
    for number in range(9):
        store.append(bucket, "desk", a_row(key=str(number)))
    assert 2 < len(files(bucket)) < 9
    assert {row.key for row in store.read(bucket)[0]} == set("012345678")


def test_files_of_a_bucket_copied_into_a_folder_are_read_there(bucket: str, tmp_path: Path) -> None:
    store.append(bucket, "desk", a_row(key="a"))
    system, path = fsspec.core.url_to_fs(bucket)
    (tmp_path / "desk").mkdir()
    for file in files(bucket):
        (tmp_path / "desk" / Path(file).name).write_bytes(system.cat_file(file))
    store.append(tmp_path, "desk", a_row(key="b"))
    assert sorted(row.key for row in store.read(tmp_path)[0]) == ["a", "b"]


def test_a_file_url_is_the_folder_itself(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/a%20folder"
    store.append(url, "desk", a_row(key="a"))
    assert (tmp_path / "a folder" / "desk" / "rows.jsonl").exists()
    assert [row.key for row in store.read(url)[0]] == ["a"]


def test_an_empty_place_holds_no_rows_and_a_missing_file_is_told(bucket: str) -> None:
    assert store.read(bucket) == ([], [])
    with pytest.raises(UserError, match="no such file or bucket"):
        store.read(f"{bucket}/rows.jsonl")


def test_what_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nosuch://x: unknown kind of URL 'nosuch'. Use a folder or s3://"):
        store.read("nosuch://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"what reaches s3:// is not installed here. Install it with: pip install s3fs"):
        store.append("s3://bucket/results", "desk", a_row())
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="pip install fsspec"):
        store.read("s3://bucket/results")


def test_history_keeps_what_read_supersedes(tmp_path: Path) -> None:
    nights = [a_row(key="a", started_at=f"2026-11-{day:02}T02:00:00Z") for day in (3, 1, 2)]
    for row in nights:
        store.append(tmp_path, "desk", row)
    store.append(tmp_path, "desk", nights[0])  # twice the same
    assert len(store.read(tmp_path)[0]) == 1
    assert [row.started_at[8:10] for row in store.history(tmp_path)[0]] == ["01", "02", "03"]


SUMS = {"kld_count": 4, "kld_sum": 0.0, "same_top_sum": 4, "dp_square_sum": 0.0}


def test_history_is_lean_but_for_the_newest_and_keeps_what_a_paired_difference_needs(tmp_path: Path) -> None:
    row = a_row()
    assert row.measurement is not None and row.quality is not None
    windows = [window | {"nll": bytes(2 * 4), "kld": bytes(2 * 4), **SUMS} for window in row.quality["windows"]]
    windows[1] |= {"nonfinite": 1, "nll": bytes(2 * 4) + b"\x00\x7e", "kld": bytes(2 * 4) + b"\x00\x7e"}
    row = replace(
        row,
        measurement=replace(row.measurement, qualities={"prose": {"windows": windows}}),
        evaluations={name: replace(test, scored_tokens=13) for name, test in row.evaluations.items()},
        artifact=replace(row.artifact, tensor_types={"a": "Q4_K"}),
    )
    newer = replace(row, started_at="2026-11-22T10:00:00Z")
    for each in (row, newer):
        store.append(tmp_path, "desk", each)
    (lean, whole), _ = store.history(tmp_path)
    assert whole == newer
    assert lean.measurement is not None and lean.quality is not None
    assert [sorted({"nll", "kld"} & set(window)) for window in lean.quality["windows"]] == [[], ["nll"], []]


class Note(TypedDict):
    night: int


def test_notes_are_lines_of_their_own(tmp_path: Path, bucket: str) -> None:
    for place in (tmp_path, bucket):
        store.append_note(place, "desk", "nights", {"night": 1}, "2026-11-21T10:00:00Z")
        store.append_note(place, "desk", "nights", {"night": 2}, "2026-11-22T10:00:00Z")
        assert store.read_notes(place, "desk", "nights", Note) == ([{"night": 1}, {"night": 2}], [])
        assert store.read(place) == ([], [])
    with (tmp_path / "desk" / "nights.jsonl").open("a") as file:
        file.write('{"night": "three"}\n{"night": 3')
    notes, warnings = store.read_notes(tmp_path, "desk", "nights", Note)
    assert notes == [{"night": 1}, {"night": 2}]
    told = [f"nights.jsonl:{line}: not a whole note, skipped (" for line in (3, 4)]
    assert all(words in warning for words, warning in zip(told, warnings, strict=True))


S3 = """
import os, subprocess, sys, uuid
from dataclasses import replace
from pathlib import Path
from typing import TypedDict
sys.path[:0] = [{root!r}]
import boto3, fsspec
from moto.server import ThreadedMotoServer
from tests.rows import a_row
from workbench.errors import UserError
from workbench.report import remote, store

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
os.environ |= {{
    "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{{port}}", "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{{port}}",
}}
s3 = boto3.client("s3")
s3.create_bucket(Bucket="nightly")
fsspec.config.conf.setdefault("s3", {{}})["endpoint_url"] = f"http://127.0.0.1:{{port}}"
place = "s3://nightly/results"
assert store.read(place) == ([], [])
for number in range(5):
    store.append(place, "desk", a_row(key=f"a-{{number}}"))
script = '''
import sys
sys.path[:0] = [{root!r}]
from tests.rows import a_row
from workbench.report import remote, store
for number in range(20):
    store.append("s3://nightly/results", "desk", a_row(key=sys.argv[1] + "-" + str(number)))
    print(number, flush=True)
'''
writers = [subprocess.Popen([sys.executable, "-P", "-c", script, name], stdout=subprocess.PIPE, text=True)
           for name in ("b", "c")]
killed = subprocess.Popen([sys.executable, "-P", "-c", script, "k"], stdout=subprocess.PIPE, text=True)
reported = [killed.stdout.readline().strip() for _ in range(3)]
killed.kill()
reported += [line.strip() for line in killed.stdout if line.endswith(chr(10))]
for writer in writers:
    writer.communicate(timeout=120)
    assert writer.returncode == 0
rows, warnings = store.read(place)
keys = {{row.key for row in rows}}
wanted = {{f"a-{{n}}" for n in range(5)}} | {{f"{{w}}-{{n}}" for w in "bc" for n in range(20)}}
assert keys >= wanted | {{f"k-{{n}}" for n in reported}}, sorted(wanted - keys)
assert warnings == []
names = [o["Key"] for o in s3.list_objects_v2(Bucket="nightly")["Contents"]]
assert len(names) <= 6, names
try:
    store.append("s3://nobodys-bucket/results", "desk", a_row())
    raise SystemExit("stored in a bucket that is not there")
except UserError as error:
    assert "cannot write rows there" in str(error), error
# Without permission: the server checks signatures from here on.
import urllib.request
url = f"http://127.0.0.1:{{port}}/moto-api/reset-auth"
urllib.request.urlopen(urllib.request.Request(url, b"0", {{"Content-Type": "text/plain"}}))
remote._written.clear()
for what in (lambda: store.read(place), lambda: store.append(place, "desk", a_row())):
    try:
        what()
        raise SystemExit("no permission was needed")
    except UserError as error:
        assert "credentials" in str(error) or "no such" in str(error), error
        print(error)
print("s3 holds")
server.stop()
"""


@pytest.mark.slow
def test_a_real_s3_server(tmp_path: Path) -> None:
    """moto's server on loopback, a thread of a process of its own: it ends with that process, however that ends."""
    script = S3.format(root=str(ROOT))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment["INITIAL_NO_AUTH_ACTION_COUNT"] = "1000"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("credentials") == 2 and "s3 holds" in done.stdout


def test_parquet_reads_back_in_pandas(tmp_path: Path) -> None:
    import pandas

    from workbench.report.formats.data import objects
    from workbench.report.formats.parquet import parquet
    from workbench.report.table import build

    rows = [
        a_row("base", windows=[(4, 8.0), (4, 10.0)]),
        a_row("q", windows=[(4, 8.4), (4, 10.0)], versions={"toy": "1.0", "commit": "abc"}),
        a_row("q", machine="lab"),
        a_row("q", evaluation="e2", key="other"),
        a_row("speed-only", evaluation=None),
    ]
    (tmp_path / "rows.parquet").write_bytes(parquet(rows))
    frame = pandas.read_parquet(tmp_path / "rows.parquet")
    assert sorted(zip(frame.machine, frame.variant, frame.evaluation_digest.fillna(""), strict=True)) == [
        ("desk", "base", "e1"),
        ("desk", "q", "e1"),
        ("desk", "q", "e2"),
        ("desk", "speed-only", ""),
        ("lab", "q", "e1"),
    ]
    table = {each["key"]: each for each in objects(build(rows[:2]))}
    q = frame[(frame.machine == "desk") & (frame.variant == "q") & (frame.evaluation_digest == "e1")].iloc[0]
    assert q.perplexity_delta == table[rows[1].key]["perplexity_delta"] != 0
    assert q.commit == "abc" and q.versions == "toy 1.0"
    assert str(frame.dtypes["kld_mean"]) == "float64"  # though nothing has one


def test_the_table_command_writes_parquet_and_reads_urls(tmp_path: Path) -> None:
    store.append(tmp_path, "desk", a_row())
    rows = ["--results", f"file://{tmp_path}"]
    told = command("table", *rows, "--format", "json")
    assert json.loads(told.stdout)[0]["variant"] == "base"
    typed = [sys.executable, "-m", "workbench.cli", "table", *rows, "--format", "parquet"]
    piped = subprocess.run(typed, capture_output=True, cwd=ROOT)
    assert piped.stdout[:4] == piped.stdout[-4:] == b"PAR1"
    made = command("table", *rows, "--format", "parquet", "-o", str(tmp_path / "out" / "rows.parquet"))
    assert made.returncode == 0 and made.stdout == ""
    assert (tmp_path / "out" / "rows.parquet").read_bytes() == piped.stdout
    for ending, beginning in ((".parquet", b"PAR1"), (".json", b"[\n  {"), (".csv", b"machine,"), (".md", b"### ")):
        assert command("table", *rows, "-o", str(tmp_path / f"t{ending}")).returncode == 0
        assert (tmp_path / f"t{ending}").read_bytes().startswith(beginning)
