"""A browser, and pages for it to open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.site import chromium
from tests.rows import REAL, a_house
from workbench.records import Machine
from workbench.report import store
from workbench.report.site import page
from workbench.report.table import build
from workbench.report.verdicts.steps import series_of, steps_of
from workbench.worker.backends import serving_command


@pytest.fixture(scope="package")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with chromium.browser(folder) as found:
        warm = folder / "warm.html"
        warm.write_text("<!doctype html><p>warm</p>")
        found.open(warm, 800)
        yield found


@pytest.fixture(scope="package")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"house": a_house(24), "large": a_house(200)}
    if REAL:
        made["real"] = store.read(*REAL)[0]
    found = {}
    for name, rows in made.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(page.page(build(rows), command=serving_command))
    nights = [
        replace(row, started_at=f"2026-{month:02}-{day:02}T00:00:00Z", key=f"{row.key}{month}{day}")
        for row in made["house"]
        for month in (9, 10)
        for day in range(1, 28, 2)
    ]
    series = series_of(nights)
    steps = [step for one in series for step in steps_of(one)]
    found["nights"] = folder / "nights.html"
    elsewhere = build([replace(row, machine=Machine("a-machine-of-another-kind")) for row in made["house"]])
    found["nights"].write_text(page.page(build(nights), series, steps, others=[elsewhere], command=serving_command))
    return found
