"""The page's view in a real Chromium: what is seen without being asked for, what is there to be asked for, what sticks,
what the address keeps, and a row in full."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from tests.report.site import chromium
from tests.rows import REAL, a_row
from workbench.report import store
from workbench.report.site import page
from workbench.report.table import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.executable() is None, reason=chromium.WHY_NOT),
]

HEADS = (
    "[...document.querySelectorAll('#rows thead th')].filter(h => h.getClientRects().length)"
    ".map(h => [h.querySelector('button')?.firstChild.textContent.trim() ?? h.textContent,"
    " h.getBoundingClientRect().right])"
)
FIELD = "[...document.querySelectorAll('[name=columns]')].find(f => f.value === {!r})"


@pytest.fixture
def real(pages: dict[str, Path]) -> Path:
    if "real" not in pages:
        pytest.skip("no stored rows of the default recipe")
    return pages["real"]


def varying() -> list[str]:
    """The columns that tell lines of one variant and engine apart."""
    return [column.name for column in build(store.read(*REAL)[0]).varying]


def query(tab: chromium.Browser) -> dict[str, list[str]]:
    return parse_qs(urlparse(tab("location.href")).query, keep_blank_values=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1920, 1280, 1024, 768, 390])
def test_what_a_choice_needs_is_seen_without_scrolling(
    tab: chromium.Browser, real: Path, width: int, dark: bool
) -> None:
    tab.open(real, width, dark=dark)
    heads = tab(HEADS)
    how = varying()
    wanted = ["variant", "engine", *how, "size", "peak RSS", "decode", "divergence", "Δ perplexity", "note"]
    left_out = {"peak RSS", "Δ perplexity"} if width < 1280 else set()
    left_out |= {"engine", *how} if width < 1000 else set()  # they stand below the variant
    assert [words for words, _ in heads] == [words for words in wanted if words not in left_out]
    assert max(right for _, right in heads) <= width
    assert tab("document.documentElement.scrollWidth") <= width
    assert tab("getComputedStyle(document.querySelector('#rows tbody th'), '::after').content") == (
        "none" if width > 1000 else '"Transformers"'
    )


def test_a_column_that_is_asked_for_is_there_and_in_the_address(tab: chromium.Browser, real: Path) -> None:
    tab.open(real, 1280)
    assert "prefill" not in [words for words, _ in tab(HEADS)] and "columns" not in query(tab)
    tab(f"{FIELD.format('prefill_tok_s')}.click()")
    assert "prefill" in [words for words, _ in tab(HEADS)]
    shown = query(tab)["columns"][0].split(",")
    assert "prefill_tok_s" in shown and "decode_tok_s" in shown
    tab.call("Page.reload")
    assert tab.wait("document.readyState === 'complete' && !!document.getElementById('rows')")
    assert "prefill" in [words for words, _ in tab(HEADS)]


def test_the_address_keeps_the_whole_view(tab: chromium.Browser, real: Path) -> None:
    tab.open(real, 1280)
    assert query(tab) == {}
    view = "find=gguf-*&engines=llamacpp&sort=-decode_tok_s&columns=decode_tok_s"
    tab.call("Page.navigate", url=f"{real.as_uri()}?{view}")
    rows = "[...document.querySelectorAll('#rows tbody tr')].filter(r => r.getClientRects().length)"
    assert tab.wait("document.readyState === 'complete' && location.search !== ''")
    found = tab(f"{rows}.map(r => [r.cells[0].textContent, r.cells[1].textContent])")
    assert found[0] == ["gguf-Q4_K_S", "llama.cpp"] and {name[:5] for name, _ in found} == {"gguf-"}
    assert {engine for _, engine in found} == {"llama.cpp"}
    assert [words for words, _ in tab(HEADS)] == ["variant", "engine", *varying(), "decode", "note"]
    assert query(tab) == parse_qs(view)
    assert tab.complaints() == []


def test_the_head_and_both_names_stay_in_sight(tab: chromium.Browser, real: Path) -> None:
    tab.open(real, 1280, 600)
    tab("document.querySelectorAll('#rows tbody tr')[20].scrollIntoView({block: 'start'})")
    place = "document.querySelector('#rows thead {}').getBoundingClientRect().{}"
    assert tab(place.format("th", "top")) == 0
    # With every column the table scrolls sideways in a box of its own, and what names a row stays.
    tab("document.querySelectorAll('[name=columns]').forEach(f => f.checked || f.click())")
    assert tab("document.getElementById('box').className") == "scroll"
    assert tab("document.documentElement.scrollWidth") <= 1280
    left = [tab(place.format(cell, "left")) for cell in ("th", "th.engine")]
    tab("document.getElementById('box').scrollTo(800, 300)")
    assert [tab(place.format(cell, "left")) for cell in ("th", "th.engine")] == left
    box_top = tab("document.getElementById('box').getBoundingClientRect().top")
    assert tab(place.format("th", "top")) == box_top
    body = "document.querySelectorAll('#rows tbody tr')[12].cells[1].getBoundingClientRect().left"
    assert tab(body) == left[1]


def test_a_point_shows_its_row_by_click_and_by_enter(tab: chromium.Browser, real: Path) -> None:
    tab.open(real, 1280)
    link = "[...document.querySelectorAll('.wide svg a')].find(a => a.textContent.startsWith({!r}))"
    name = "gguf-Q6_K on llama.cpp"
    tab(f"{link.format(name)}.dispatchEvent(new MouseEvent('click', {{bubbles: true, cancelable: true}}))")
    panel = "document.getElementById('panel')"
    assert tab.wait(f"{panel}.open")
    told = tab(f"{panel}.innerText")
    assert "llama-server --model " in told and "SmolLM2-135M-Instruct-Q6_K.gguf" in told
    assert "156,951,552 bytes (149.7 MiB)" in told and "llama-cpp-python 0.3.36" in told
    assert tab("scrollY") == 0  # the page stays where it was
    assert tab("location.hash") == tab(f"{link.format(name)}.getAttribute('href')")
    tab.press("Escape", 27)
    assert tab.wait(f"!{panel}.open && !location.hash")
    # By keyboard alone: the next point to the right, then Enter.
    tab(f"{link.format(name)}.focus()")
    tab.press("ArrowRight", 39)
    label = tab("document.activeElement.textContent")
    assert not label.startswith(name)
    tab.press("Enter", 13)
    assert tab.wait(f"{panel}.open")
    assert tab(f"{panel}.querySelector('h3').textContent") == label.partition(":")[0]
    assert tab.complaints() == []


def test_every_point_is_named(tab: chromium.Browser, real: Path) -> None:
    for width, shown in ((1280, ".wide"), (390, ".narrow")):
        tab.open(real, width)
        unnamed = f"""[...document.querySelectorAll('{shown} svg:has(a)')].flatMap(svg => {{
          const named = new Set([...svg.querySelectorAll('text[data-r]')].flatMap(t => t.dataset.r.split(' ')));
          return [...svg.querySelectorAll('a')].filter(a => !named.has(a.dataset.r)); }}).length"""
        assert tab(unnamed) == 0
        assert tab(f"document.querySelectorAll('{shown} svg a').length") >= 80


def test_without_javascript_it_can_be_read(tab: chromium.Browser, real: Path) -> None:
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(real, 1280)
        wanted = ["variant", "engine", *varying(), "size", "peak RSS"]
        assert [words for words, _ in tab(HEADS)][: len(wanted)] == wanted
        assert tab("document.documentElement.scrollWidth") <= 1280
        assert not tab("document.querySelector('.filters').checkVisibility()")
        # A link to a row opens it where it stands.
        tab("document.querySelector('#rows tbody tr:nth-child(5) th a').click()")
        shown = "document.getElementById('r4').checkVisibility() && document.getElementById('r4').textContent"
        assert tab.wait(shown) and "SmolLM2-135M-Instruct-awq-4bit-g128" in tab(shown)
        assert not tab("document.getElementById('panel').open")
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_rows_are_there_to_be_taken(tab: chromium.Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page.page(build([a_row(), a_row("q")]), rows_file="toy.jsonl"))
    tab.open(file, 1280)
    href = tab("document.querySelector('a[download$=csv]').href")
    found = list(csv.DictReader(io.StringIO(base64.b64decode(href.partition(",")[2]).decode())))
    assert [row["variant"] for row in found] == ["base", "q"] and float(found[0]["decode_tok_s"]) == 10
    assert tab("[...document.querySelectorAll('a[download]')].at(-1).getAttribute('href')") == "toy.jsonl"
