"""Entries of the cache in a store that machines share: made once, checked after each download, never half there."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from workbench import home as place
from workbench import shared
from workbench.errors import UserError


@dataclass(frozen=True)
class Note:
    """A record as entries have them."""

    text: str


class Machines:
    """Machines that share a store, each with a cache of its own; here one after the other."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        self._folder, self._monkeypatch = folder, monkeypatch

    def on(self, name: str) -> None:
        shared._settled.clear()
        self._monkeypatch.setenv("WORKBENCH_HOME", str(self._folder / name))

    def entry(self, key: str = "k", content: bytes = b"x" * 100_000) -> tuple[Path, Note]:
        def build(folder: Path) -> Note:
            self.made += 1
            (folder / "model").mkdir()
            (folder / "model" / "weights.bin").write_bytes(content)
            return Note("made")

        return place.entry("artifacts", key, Note, build)


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    url = str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/store"
    monkeypatch.setenv(shared.STORE, url)
    shared._settled.clear()
    yield url
    shared._settled.clear()


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(tmp_path, monkeypatch)


def uploads(store: str, key: str = "k") -> set[str]:
    files, path = fsspec.core.url_to_fs(store)
    return {name.split("/")[-1] for name in files.ls(f"{path}/artifacts/{key}", detail=False)} - {"current.json"}


def test_what_one_machine_made_the_others_take(store: str, machines: Machines) -> None:
    machines.on("one")
    folder, _ = machines.entry()
    machines.on("two")
    assert place.stored("artifacts", "k", Note) == Note("made")
    there, note = machines.entry()
    assert there != folder and note == Note("made") and machines.made == 1
    assert (there / "model" / "weights.bin").read_bytes() == b"x" * 100_000
    assert len(uploads(store)) == 1
    # Of what nobody made there is nothing.
    assert place.stored("artifacts", "other", Note) is None


def test_what_was_made_before_there_was_a_store_goes_up_when_it_is_used(
    store: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(shared.STORE)
    machines.on("one")
    machines.entry()
    monkeypatch.setenv(shared.STORE, store)
    machines.entry()
    machines.on("two")
    machines.entry()
    assert machines.made == 1


def test_a_spoiled_upload_is_found_after_download_and_made_anew(
    store: str, machines: Machines, capsys: pytest.CaptureFixture[str]
) -> None:
    machines.on("one")
    machines.entry()
    (upload,) = uploads(store)
    files, path = fsspec.core.url_to_fs(store)
    files.pipe_file(f"{path}/artifacts/k/{upload}/model/weights.bin", b"x" * 50_000 + b"y" + b"x" * 49_999)
    machines.on("two")
    there, _ = machines.entry()
    assert machines.made == 2 and "its content changed: made anew" in capsys.readouterr().err
    # And the store has it as it should be again.
    machines.on("three")
    there, _ = machines.entry()
    assert machines.made == 2 and (there / "model" / "weights.bin").read_bytes() == b"x" * 100_000


def test_an_upload_that_was_cut_off_is_not_there(
    store: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines.on("one")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(shared, "_put", killed)
        with pytest.raises(KeyboardInterrupt):
            machines.entry()
    machines.on("two")
    assert place.stored("artifacts", "k", Note) is None
    # Whoever made it still has it, and sends it up the next time.
    machines.on("one")
    machines.entry()
    machines.on("two")
    assert place.stored("artifacts", "k", Note) == Note("made") and machines.made == 1


def test_a_store_that_is_full_loses_nothing(store: str, machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    machines.on("one")
    files, _ = fsspec.core.url_to_fs(store)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(type(files), "put_file", full)
        with pytest.raises(UserError, match=r"cannot write artifacts there .*No space left.*name another --store"):
            machines.entry()
    assert machines.entry()[1] == Note("made") and machines.made == 1 and len(uploads(store)) <= 2


def test_a_store_that_names_files_elsewhere_writes_none(store: str, machines: Machines, tmp_path: Path) -> None:
    machines.on("one")
    machines.entry()
    files, path = fsspec.core.url_to_fs(store)
    for name in ("../../escaped", "/etc/escaped"):
        files.pipe_file(f"{path}/artifacts/k/current.json", json.dumps({"upload": "u", "files": [name]}).encode())
        machines.on("two")
        with pytest.raises(UserError, match="is no file of an entry"):
            machines.entry()
    files.pipe_file(f"{path}/artifacts/k/current.json", b"[]")
    with pytest.raises(UserError, match="not as it was written"):
        machines.entry()


def test_machines_that_share_a_store_are_one_installation(store: str, machines: Machines) -> None:
    machines.on("one")
    name = place.installation()
    machines.on("two")
    assert place.installation() == name and len(name) == 6


def test_what_is_of_one_machine_stays_there(store: str, machines: Machines) -> None:
    machines.on("one")
    place.entry("bandwidth", "k", Note, lambda folder: Note("fast"))
    machines.on("two")
    assert place.stored("bandwidth", "k", Note) is None


def test_files_of_somebody_elses_stay_where_they_are(store: str, machines: Machines, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")

    @dataclass(frozen=True)
    class Base:
        path: str

    machines.on("one")
    place.entry("bases", "k", Base, lambda folder: Base(str(theirs)))
    machines.on("two")
    assert place.stored("bases", "k", Base) is None


def test_steps_with_their_own_gpus_work_side_by_side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(place.tempfile, "tempdir", str(tmp_path))
    waited: list[str] = []
    monkeypatch.setenv(place.OWN_GPUS, "GPU-1")
    with place.machine_lock(waited.append, "one"):
        monkeypatch.setenv(place.OWN_GPUS, "GPU-2,GPU-3")
        with place.machine_lock(waited.append, "two"):
            assert waited == []
            import fcntl

            for name in ("workbench.lock", "workbench.lock.GPU-1", "workbench.lock.GPU-3"):
                with open(tmp_path / name) as file, pytest.raises(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
