"""The choice in a real Chromium: under any limits what `recommend` says of the same rows, with the row's command."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.site import chromium
from tests.rows import REAL, a_row, compared
from workbench.records import Row, Speed
from workbench.report import store
from workbench.report.site import page
from workbench.report.site.plots import row_ids
from workbench.report.site.words import full_name
from workbench.report.table import Table, build
from workbench.report.verdicts.recommend import Constraints, recommend
from workbench.worker.backends import serving_command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.executable() is None, reason=chromium.WHY_NOT),
]

ANSWER = "document.getElementById('answer')"
NOTHING = {"memory": "", "divergence": "", "speed": "", "context": "", "on": "", "by": "speed"}


def busy_rows() -> list[Row]:
    """A base whose speed nobody knows, since the machine was busy, and variants that were measured well."""
    rows = []
    for variant, kld, steps in (
        ("base", 0.0, [[0.1, 0.1], [0.0002, 0.0002], [4.0, 4.0]]),
        ("Q8_0", 0.01, [[0.0125, 0.0125], [0.0126, 0.0126], [0.0124, 0.0124]]),
        ("Q4_0", 0.3, [[0.010, 0.010], [0.0105, 0.0105], [0.0104, 0.0104]]),
        ("Q2_K", 1.2, [[0.010, 0.010], [0.012, 0.012], [0.008, 0.008]]),
    ):
        row = compared(a_row(variant, step_s=steps, warnings=["the machine was busy"] * (variant == "base")), kld)
        assert row.measurement is not None
        long = Speed(2000, 3, 1, [1.0] * 3, [[2 * step for step in each] for each in steps], [[1, 1]] * 3)
        rows.append(replace(row, measurement=replace(row.measurement, speeds=[*row.measurement.speeds, long])))
    return rows


def wishes(**limits: list[str]) -> list[dict[str, str]]:
    """Some of all combinations of the limits, always the same ones."""
    every = [dict(zip(limits, values, strict=True)) for values in itertools.product(*limits.values())]
    return [NOTHING | wish for wish in random.Random(0).sample(every, min(60, len(every)))]


def constraints(wish: dict[str, str]) -> Constraints:
    def number(name: str, factor: float = 1) -> float | None:
        return float(wish[name]) * factor if wish[name] else None

    return Constraints(
        memory_bytes=number("memory", 2**30),
        max_kld=number("divergence"),
        min_decode_tok_s=number("speed"),
        context=int(wish["context"]) if wish["context"] else None,
        backend=wish["on"] or None,
        sort=wish["by"],
    )


def opened(tab: chromium.Browser, folder: Path, table: Table) -> None:
    file = folder / "page.html"
    file.write_text(page.page(table, command=serving_command))
    tab.open(file, 1280)


def assert_agrees(tab: chromium.Browser, table: Table, wish: dict[str, str]) -> None:
    found = recommend(table, constraints(wish), serving_command)
    tab(f"choose({json.dumps(wish)})")
    words = tab(f"{ANSWER}.innerText")
    if found.choice is None:
        assert words.startswith("Nothing fits."), wish
        return
    chosen = row_ids(table)[found.choice.line.row.key]
    assert tab(f"{ANSWER}.querySelector('a').getAttribute('href')") == f"#{chosen}", (wish, str(found))
    assert (found.command or "Its engine has no server for it.") in words
    if found.runner_up:
        assert f"Runner-up: {full_name(table, found.runner_up.line)}, " in words, (wish, str(found))
    assert ("It is not known whether" in words) == bool(found.choice.doubts), (wish, str(found))
    assert ("would be chosen, were it known" in words) == bool(found.hope), (wish, str(found))


def test_it_is_what_recommend_says_of_the_published_rows(tab: chromium.Browser, tmp_path: Path) -> None:
    if not REAL:
        pytest.skip("no stored rows of the default recipe")
    table = build(store.read(*REAL)[0])
    opened(tab, tmp_path, table)
    for wish in wishes(
        memory=["", "0.53", "0.6", "1"],
        divergence=["", "0.05", "0.08", "0.15"],
        speed=["", "64", "113", "125"],
        context=["", "544", "4096"],
        on=["", "llamacpp", "vllm"],
        by=["speed", "quality", "memory", "size"],
    ):
        assert_agrees(tab, table, wish)
    assert tab.complaints() == []


def test_it_is_what_recommend_says_of_rows_of_a_busy_machine(tab: chromium.Browser, tmp_path: Path) -> None:
    table = build(busy_rows())
    opened(tab, tmp_path, table)
    for wish in wishes(
        divergence=["", "0.005", "0.01", "0.5"],
        speed=["", "30", "50", "79.5", "96"],
        context=["", "100", "2003", "2004"],
        by=["speed", "quality", "memory", "size"],
    ):
        assert_agrees(tab, table, wish)
    # What is known to hold goes before what only may: the base's interval reaches from far below 50 to far above.
    tab(f"choose({json.dumps(NOTHING | {'speed': '50', 'by': 'quality'})})")
    assert tab(f"{ANSWER}.innerText").startswith("Q8_0 on llama.cpp")
    tab(f"choose({json.dumps(NOTHING | {'speed': '50', 'divergence': '0.005'})})")
    words = tab(f"{ANSWER}.innerText")
    assert words.startswith("base on llama.cpp") and "the machine was busy" in words
    assert "measure again with `workbench run RECIPE --again -v base -b llamacpp`" in words


def test_a_limit_that_is_typed_is_in_the_address_and_in_the_plots(
    tab: chromium.Browser, pages: dict[str, Path]
) -> None:
    if "real" not in pages:
        pytest.skip("no stored rows of the default recipe")
    tab.open(pages["real"], 1280)
    first = tab(f"{ANSWER}.querySelector('a').textContent")
    tab("document.querySelector('[name=divergence]').focus()")
    for mark in "0.05":
        tab.call("Input.insertText", text=mark)
    answer = tab(f"{ANSWER}.querySelector('a').textContent")
    table = build(store.read(*REAL)[0])
    choice = recommend(table, Constraints(max_kld=0.05)).choice
    assert choice is not None and answer == full_name(table, choice.line) != first
    assert tab("location.search") == "?divergence=0.05"
    assert "fail by divergence" in tab(f"{ANSWER}.innerText")
    faded = tab("[...document.querySelectorAll('#plot-choice .wide a.unfit')].map(a => Number(a.dataset.y))")
    assert faded and min(faded) > 0.04
    assert tab("document.querySelectorAll('#plot-choice .wide a.chosen').length") == 1
    assert "llama-server --model " in tab(f"{ANSWER}.querySelector('pre').textContent")
    # The link alone brings it all back.
    tab.call("Page.reload")
    assert tab.wait(f"document.readyState === 'complete' && {ANSWER}.querySelector('a')?.textContent === {answer!r}")


def test_without_javascript_it_is_recommends_own_choice(tab: chromium.Browser, tmp_path: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        opened(tab, tmp_path, build(busy_rows()))
        choice = recommend(build(busy_rows()), Constraints()).choice
        assert choice is not None
        words = tab(f"{ANSWER}.innerText")
        assert words.startswith(f"{choice.line.row.artifact.variant} on llama.cpp") and "llama-server" in words
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)
