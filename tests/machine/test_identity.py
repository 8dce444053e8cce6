"""A machine is its hardware: one name, whatever the cache is called, and older folders' rows and nights go with it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import command
from tests.places import ROOT
from tests.rows import REAL, a_row
from workbench import nightly
from workbench.errors import UserError
from workbench.home import installation
from workbench.machine.identity import machine
from workbench.profile.jobs import already_measured
from workbench.recipe.load import load
from workbench.records import Accelerator, Machine
from workbench.report import store
from workbench.report.table import build
from workbench.report.verdicts.steps import series_of

DESK = Machine("amd-epyc-2-cores-24-gib-8c14f5", "AMD EPYC", 2, 25276502016)


def test_a_name_is_of_gpus_processor_cores_and_memory() -> None:
    assert DESK.hardware == "amd-epyc-2-cores-24-gib"
    cards = [Accelerator("NVIDIA H100 80GB HBM3", 1)] * 2
    assert replace(DESK, gpus=cards[:1]).hardware == "nvidia-h100-80gb-hbm3-amd-epyc-2-cores-24-gib"
    assert replace(DESK, gpus=cards).hardware == "2-nvidia-h100-80gb-hbm3-amd-epyc-2-cores-24-gib"
    for seen, sold in (
        (23.4, 24),
        (23.9, 24),
        (7.6, 8),
        (17.5, 18),
        (62.7, 64),
        (125.6, 128),
        (503, 512),
        (2015, 2048),
    ):
        assert replace(DESK, memory_bytes=int(seen * 2**30)).hardware == f"amd-epyc-2-cores-{sold}-gib"
    assert DESK.hardware == replace(DESK, name="x", system="Linux 9", driver="580", python="3.12").hardware
    assert Machine("desk").hardware == ""


def test_this_machines_name_is_not_of_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    here = machine.__wrapped__()
    assert here.name == here.hardware and re.fullmatch(r"[a-z0-9-]+-gib", here.name)
    assert not (tmp_path / "home").exists()


def test_rows_under_an_older_name_are_of_the_same_machine() -> None:
    """Names used to end in a part of the cache folder's digest."""
    rows, _ = store.read(*REAL)
    rows = [
        replace(row, machine=replace(row.machine, name=DESK.name)) if place % 2 else row
        for place, row in enumerate(rows)
    ]
    assert {row.machine.name for row in rows} == {DESK.name, DESK.hardware}
    assert {store.machine_of(row) for row in rows} == {DESK.hardware}
    tables = [build(rows, machine=name) for name in (DESK.hardware, DESK.name)]
    assert len(tables[0].lines) == len(tables[1].lines) > 40
    assert not any("another machine" in note for note in tables[0].notes)
    with pytest.raises(UserError, match="unknown machine 'amd-epyc-2-cores'. Did you mean 'amd-epyc-2-cores-24-gib'"):
        build(rows, machine="amd-epyc-2-cores")


def test_the_newest_row_of_a_job_wins_whichever_folder_it_is_in(tmp_path: Path) -> None:
    new = replace(a_row(key="1"), machine=replace(DESK, name=DESK.hardware), started_at="2026-11-22T00:00:00Z")
    old = replace(a_row(key="1"), machine=DESK)
    for row in (old, new):
        store.append(tmp_path, row.machine.name, row)
    assert store.read(tmp_path)[0] == [new]
    assert [row.started_at for row in store.history(tmp_path)[0]] == [old.started_at, new.started_at]
    (series,) = series_of(store.history(tmp_path)[0])
    assert (series.machine, len(series.points)) == (DESK.hardware, 2)


def test_a_night_of_an_older_name_is_a_night_of_this_machine(tmp_path: Path) -> None:
    recipe = load(ROOT / "recipes" / "tiny.yaml")
    row = replace(a_row(), base=recipe.model, recipe=recipe.name)
    older = replace(machine(), name=f"{machine().name}-8c14f5")
    store.append(tmp_path, older.name, replace(row, machine=older))
    note = nightly.night.note_of(
        recipe.name, "2026-11-21T02:00:00Z", "2026-11-21T05:00:00Z", nightly.night.judge([], [])
    )
    store.append_note(tmp_path, older.name, "nights", note, note["since"])
    assert nightly.accept(recipe, tmp_path) == "2026-11-21T02:00:00Z"
    kept, _ = store.read_notes(tmp_path, machine().name, "nights", nightly.NightNote)
    assert [each["accepted"] for each in kept] == [True]


def test_rows_of_a_machine_by_either_name_go_into_a_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    store.append(tmp_path, DESK.name, replace(a_row(), machine=DESK))
    for name in (DESK.name, DESK.hardware):
        out = tmp_path / f"{name}.parquet"
        made = command("table", str(tmp_path), "--machine", name, "--format", "parquet", "-o", str(out))
        assert made.returncode == 0 and pyarrow.read_table(out).num_rows == 1, made.stderr


def test_what_another_of_such_hardware_published_is_measured_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer's first table is of their own machine, though rows of the same hardware came with the program."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    own, here = installation(), machine()
    published = replace(here, installation="0" * 6 if own != "0" * 6 else "1" * 6)
    older = replace(here, name=f"{here.name}-{own}")
    for made, known in ((published, False), (replace(here, installation=own), True), (older, True)):
        assert bool(already_measured([replace(a_row(), machine=made)], "")) is known
