"""The page in a real Chromium, on a desktop and on a phone: it renders, sorts, filters, and nothing complains."""

from __future__ import annotations

import statistics as plain
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.site import chromium
from tests.rows import a_house, a_row
from workbench.report.site import page
from workbench.report.site.publish import publish
from workbench.report.table import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.executable() is None, reason=chromium.WHY_NOT),
]

OVERLAPS = """(() => { const bad = [];
for (const svg of document.querySelectorAll("svg")) {
  if (!svg.getClientRects().length) continue;
  const edge = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].filter(t => t.getClientRects().length)
    .map(t => [t.textContent, t.getBoundingClientRect()]);
  texts.forEach(([words, a], i) => {
    if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
      bad.push([words, "outside", svg.getAttribute("aria-label")]);
    for (const [other, b] of texts.slice(i + 1))
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3)
        bad.push([words, other, svg.getAttribute("aria-label")]);
  });
}
const blocks = [...document.querySelectorAll("h1, h2, figcaption, label, legend, output, dt, dd, .notes li")]
  .filter(e => e.checkVisibility()).map(e => [e, e.getBoundingClientRect()]);
blocks.forEach(([one, a], i) => { for (const [two, b] of blocks.slice(i + 1))
  if (!one.contains(two) && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2
      && b.top < a.bottom - 2)
    bad.push([one.textContent, two.textContent, "page"]); });
return bad; })()"""
SHOWN = "[...document.querySelectorAll('#rows tbody tr')].filter(r => r.getClientRects().length)"
CELLS = f"{SHOWN}.map(r => r.cells[%d].dataset.v ?? null).filter(v => v !== null).map(Number)"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1920, 1280, 390])
@pytest.mark.parametrize("name", ["real", "house", "nights", "large"])
def test_it_renders(tab: chromium.Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    if name not in pages:
        pytest.skip("no stored rows of the default recipe")
    tab.open(pages[name], width, dark=dark)
    assert tab(OVERLAPS) == []
    assert tab("document.documentElement.scrollWidth") <= width  # only the table scrolls sideways
    assert tab("[...document.querySelectorAll('svg')].filter(s => s.getClientRects().length).length") >= 5
    assert tab.complaints() == []
    assert set(tab.requests()) == {pages[name].as_uri()}
    paper = tab("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
    # What a browser takes its time for (benchmarks/page_opens.py): elements, few a pair and engine.
    assert tab("document.querySelectorAll('*').length") < (24_000 if name == "large" else 7_000)
    assert pages[name].stat().st_size < 2_000_000


def write(tab: chromium.Browser, field: str, words: str) -> None:
    """Fill a field of the page's form, as somebody does who types."""
    found = f"document.querySelector('[name={field}]')"
    tab(f"(f => {{ f.value = {words!r}; f.dispatchEvent(new Event('input')) }})({found})")


def head(tab: chromium.Browser, words: str) -> int:
    place = tab(
        f"[...document.querySelectorAll('#rows th[scope=col]')].findIndex(h => h.textContent.startsWith({words!r}))"
    )
    assert place >= 0
    return int(place)


def test_sorting_by_mouse_and_by_keyboard(tab: chromium.Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["house"], 1280)
    for words, best_first, way in (("divergence", False, "ascending"), ("decode", True, "descending")):
        place = head(tab, words)
        button = f"document.querySelectorAll('#rows th[scope=col]')[{place}].querySelector('button')"
        before = tab(CELLS % place)
        tab(f"{button}.click()")
        assert tab(CELLS % place) == sorted(before, reverse=best_first)
        assert tab(f"{button}.closest('th').getAttribute('aria-sort')") == way
        tab(f"{button}.focus()")
        tab.press("Enter", 13)
        assert tab(CELLS % place) == sorted(before, reverse=not best_first)
        tab("document.querySelector('[name=sort]').value = ''; update()")
    tab(f"{button}.click(); {button}.click(); {button}.focus()")
    tab.press(" ", 32)
    assert tab(CELLS % place) == before
    names = f"{SHOWN}.map(r => r.cells[0].textContent)"
    tab("document.querySelector('#rows th button').click()")
    # 'Q2' before 'Q10'
    found = [name for name in tab(names) if name.startswith("gguf")]
    assert found == sorted(found, key=lambda name: int(name.split("Q")[1].split("_")[0]))
    assert tab.complaints() == []


def test_what_was_not_measured_sorts_last_either_way(tab: chromium.Browser, tmp_path: Path) -> None:
    rows = [a_row(), a_row("q", windows=[(4, 9.0), (4, 9.0)]), a_row("none", measured=False, error="it broke")]
    file = tmp_path / "page.html"
    file.write_text(page.page(build(rows)))
    tab.open(file, 1280)
    place = head(tab, "Δ perplexity")
    for _ in range(2):
        tab(f"document.querySelectorAll('#rows th[scope=col]')[{place}].querySelector('button').click()")
        assert tab(f"{SHOWN}.map(r => r.cells[0].textContent)")[-1] == "none"


def test_filtering_table_and_plots(tab: chromium.Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["house"], 1280)
    total = tab(f"{SHOWN}.length")
    marks = (
        "[...document.querySelectorAll('.wide svg :is(a, g)[data-r]')].filter(m => m.getClientRects().length).length"
    )
    drawn = tab(marks)
    found = f"{SHOWN}.map(r => [r.cells[0].textContent, r.cells[1].textContent])"
    for words in ("q3_ vllm", "*Q3* vllm", "gguf-Q?_K_M-imatrix, q3_, VLLM"):
        write(tab, "find", words)
        assert tab(found) == [["gguf-Q3_K_M-imatrix", "vLLM"]], words
    assert tab("document.getElementById('count').textContent") == f"1 of {total} rows"
    assert tab(marks) == 5  # one mark in each plot
    write(tab, "find", "gguf-*")
    assert {name for name, _ in tab(found)} == {f"gguf-Q{n}_K_M-imatrix" for n in range(1, 8)}
    write(tab, "find", "Q3*")  # a pattern is of a whole name
    assert tab(found) == []
    write(tab, "find", "")
    assert tab(f"{SHOWN}.length") == total and tab(marks) == drawn
    # By keyboard: the first engine's box.
    tab("document.querySelector('[name=engines]').focus()")
    tab.press(" ", 32)
    assert set(tab(f"{SHOWN}.map(r => r.dataset.g)")) == {"vllm", "llamacpp"}
    write(tab, "find", "nothing is called so")
    assert tab(f"{SHOWN}.length") == 0
    assert tab.complaints() == []


def test_what_a_name_says_is_never_run(tab: chromium.Browser, tmp_path: Path) -> None:
    evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    rows = [
        a_row("base", f"b{evil}"),
        a_row(f"q{evil}", f"b{evil}", recipe=evil, base=f"Toy-1M{evil}", evaluation=None),
    ]
    file = tmp_path / "page.html"
    file.write_text(page.page(build(rows[:1])) + page.page(build(rows)))
    tab.open(file, 1280)
    assert tab("document.title") != "run"
    assert tab("document.querySelectorAll('img').length") == 0


def test_it_can_be_read_without_a_mouse_or_eyes(tab: chromium.Browser, pages: dict[str, Path]) -> None:
    tab.open(pages["nights"], 1280)
    assert tab("document.documentElement.lang") == "en"
    # A plot with links in it is a group: in a picture nobody could reach them.
    role = "s.querySelector('a') ? 'group' : 'img'"
    named = f"s.getAttribute('aria-label') && s.getAttribute('role') === ({role})"
    assert tab(f"[...document.querySelectorAll('svg')].every(s => {named})")
    assert tab("[...document.querySelectorAll('input:not([type=hidden]), select')].every(i => i.closest('label'))")
    assert tab("[...document.querySelectorAll('#rows thead th')].every(h => h.scope === 'col')")
    assert tab("document.querySelectorAll('h1').length") == 1
    order = []
    for _ in range(30):
        tab.press("Tab", 9)
        order.append(tab("document.activeElement.name || document.activeElement.tagName"))
    # The points of a plot are one stop.
    assert "find" in order and order[order.index("find") - 1] == "a" and order.count("a") < 3
    paper = tab("getComputedStyle(document.body).backgroundColor")
    inks = ("document.body", "document.querySelector('.soft')", "document.querySelector('.filters label')")
    contrast = [ratio(paper, tab(f"getComputedStyle({ink}).color")) for ink in inks]
    assert min(contrast) >= 4.5, contrast  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_leads_from_page_to_page(tab: chromium.Browser, tmp_path: Path, width: int) -> None:
    rows = [
        replace(row, started_at=f"2026-10-{day:02}T00:00:00Z", key=f"{row.key}{day}")
        for row in a_house(6)
        for day in range(1, 9)
    ]
    publish(rows, tmp_path)
    tab.open(tmp_path / "index.html", width)
    assert tab("document.querySelector('img').naturalWidth") > 50  # the badge
    assert tab("document.documentElement.scrollWidth") <= width
    assert tab.complaints() == []
    link = tab("document.querySelector('tbody a').href")
    tab.open(Path(link.removeprefix("file://")), width)
    assert tab(OVERLAPS) == [] and tab.complaints() == []
    assert tab("document.querySelector('header a').href") == (tmp_path / "index.html").as_uri()


def ratio(one: str, two: str) -> float:
    """WCAG's contrast of two `rgb(...)` colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return plain.fmean([0.2126 * 3 * linear[0], 0.7152 * 3 * linear[1], 0.0722 * 3 * linear[2]])

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
