"""The page as text: every number is in the rows, everything is escaped, nothing is asked of a network; its size."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.command import command
from tests.rows import REAL, a_house, a_row
from workbench.records import Row, Task
from workbench.report import estimates as statistics
from workbench.report import store
from workbench.report.formats.data import objects
from workbench.report.site import charts, page, plots, svg
from workbench.report.table import Table, build
from workbench.report.verdicts.steps import series_of, steps_of


def real_rows() -> list[Row]:
    if not REAL:
        pytest.skip("no stored rows of the default recipe")
    return store.read(*REAL)[0]


class Reader(HTMLParser):
    """Cells of the table, and every number that any mark carries."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []
        self.cells: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._value: str | None = None
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        for name, value in attrs:
            if re.fullmatch(r"data-(v|x|y|p\d+)", name) and value:
                self.numbers.append(float(value))
        if tag == "td" and found.get("data-v"):
            self._value = found["data-v"]
            self.cells.append((str(self._value), ""))
        elif tag == "small":
            self._value = None
        elif tag != "td":
            self._value = self._value if tag == "td" else None

    def handle_data(self, data: str) -> None:
        if self._value is not None and self.cells:
            value, text = self.cells[-1]
            self.cells[-1] = (value, text + data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._value = None


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def known_numbers(table: Table, rows: list[Row]) -> set[float]:
    """Everything the page may show, straight from the rows."""
    known: set[float] = set()
    for record in objects(table):
        known |= {float(v) for v in record.values() if isinstance(v, int | float) and not isinstance(v, bool)}
    for own in table.sets.values():
        known |= {value for line in own.lines for value in line.values.values() if value is not None}
    for floor in table.first.noise_floors:
        known |= {floor.low, floor.high, *(value for _, value in floor.divergences)}
    for row in rows:
        if row.measurement is None:
            continue
        known |= {float(v) for v in row.measurement.memory.values() if isinstance(v, int | float)}
        steps = sorted(step for repeat in row.measurement.speeds[0].step_s for step in repeat)
        known |= {statistics.quantile(steps, p / 100) for p in (5, 25, 50, 75, 95)} if steps else set()
    return known


@pytest.mark.parametrize("source", ["real", "made"])
def test_every_number_on_the_page_is_found_in_the_rows(source: str) -> None:
    rows = real_rows() if source == "real" else a_house(21)
    table = build(rows)
    reader = read(page.page(table))
    assert len(reader.numbers) > 200
    known = known_numbers(table, rows)
    assert [number for number in reader.numbers if number not in known] == []
    assert len(reader.cells) > 100
    scales = (1.0, 2.0**20, 0.01, 1e-3)
    for value, text in reader.cells:
        shown = float(text.strip().replace("+", ""))
        digits = len(text.partition(".")[2].strip())
        assert any(abs(shown - float(value) / scale) <= 0.51 * 10**-digits for scale in scales), (value, text)


def test_all_lines_are_in_the_table_with_their_reasons() -> None:
    rows = [
        a_row(),
        a_row("q", measured=False, unsupported="vLLM has no GGUF"),
        a_row("r", measured=False, error="NaN"),
    ]
    text = page.page(build(rows))
    assert text.count("<tr data-r=") == 3
    assert '<li id="n2">vLLM has no GGUF</li>' in text and "cannot run <a" in text and "failed <a" in text


def test_html_in_names_is_text() -> None:
    evil = '<img src=x onerror="alert(1)">\'"&</script><script>alert(2)</script>'
    row = a_row(
        f"q{evil}",
        f"engine{evil}",
        base=f"M{evil}",
        warnings=[f"warn {evil}"],
        recipe=evil,
        machine=f"m{evil}",
        versions={evil: evil},
        options={evil: evil},
    )
    base = a_row("base", f"engine{evil}", base=f"M{evil}", machine=f"m{evil}")
    failed = replace(row, artifact=replace(row.artifact, variant=f"f{evil}"), key="f", measurement=None, error=evil)
    rows = [base, row, failed]
    later = [replace(r, started_at="2026-11-22T10:00:00Z") for r in rows]
    series = series_of([*rows, *later])
    table = build(rows)
    text = page.page(table, series, [step for one in series for step in steps_of(one)], back=evil)
    reader = read(text)
    assert {tag for tag, _ in reader.tags} <= {
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "p",
        "a",
        "main",
        "section",
        "form",
        "label",
        "input",
        "fieldset",
        "legend",
        "output",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "button",
        "small",
        "ol",
        "ul",
        "li",
        "figure",
        "figcaption",
        "b",
        "svg",
        "g",
        "path",
        "rect",
        "circle",
        "text",
        "dl",
        "dt",
        "dd",
        "script",
        "span",
        "time",
        "em",
        "h3",
        "pre",
        "details",
        "summary",
        "dialog",
        "code",
        "option",
        "select",
    }
    assert [found.get("type") for tag, found in reader.tags if tag == "script"] == ["application/json", None]
    assert not any(name.startswith("on") and name != "onsubmit" for _, found in reader.tags for name in found)
    for plot in plots.plots(table, series):
        xml.fromstring(svg.standalone(plot.wide))  # well-formed, whatever the names
    assert "alert(2)" in text  # shown, as text


def test_a_name_with_control_characters_is_still_xml() -> None:
    rows = [a_row("a\x00b\x1b[2J\ud800"), a_row("base")]
    for plot in plots.plots(build(rows)):
        xml.fromstring(svg.standalone(plot.narrow))
    page.page(build(rows)).encode()


def test_nothing_is_asked_of_a_network() -> None:
    text = page.page(build(a_house(9)))
    assert "default-src 'none'" in text
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "@import" not in text and "url(" not in text and "fetch(" not in text


def test_two_hundred_rows_are_under_two_megabytes() -> None:
    rows = a_house(200)
    table = build(rows)
    assert len(table.lines) == 200
    # With a month of nights, for the plots over time.
    nights = [
        replace(row, started_at=f"2026-10-{day:02}T00:00:00Z", key=f"{row.key}{day}")
        for row in rows[:60]
        for day in range(1, 31)
    ]
    size = len(page.page(table, series_of(nights)).encode())
    assert size < 2_000_000, size


def overlaps(drawn: str) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes meet, by the width that the drawing itself reckons with."""
    boxes = []
    for text in xml.fromstring(svg.standalone(drawn)).iter("{http://www.w3.org/2000/svg}text"):
        words = text.text or ""
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), 6.2 * len(words)
        y += float(text.attrib.get("dy", 0))
        left = {"middle": x - wide / 2, "end": x - wide}.get(text.attrib.get("text-anchor", ""), x)
        boxes.append((left, y - 10, left + wide, y + 2, words))
    return [
        (a[4], b[4])
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


@pytest.mark.parametrize("count", [5, 21, 60])
def test_labels_do_not_overlap(count: int) -> None:
    rows = a_house(count)
    nights = [
        replace(row, started_at=f"2026-{month:02}-{day:02}T00:00:00Z", key=f"{row.key}{month}{day}")
        for row in rows
        for month in (9, 10)
        for day in range(1, 28, 3)
    ]
    found = plots.plots(build(rows), series_of(nights))
    assert {plot.name for plot in found} >= {"choice", "quality-size", "memory", "latency", "divergence"}
    assert "history-perplexity" in {plot.name for plot in found}
    for plot in found:
        assert overlaps(plot.wide) == [] and overlaps(plot.narrow) == [], plot.name


def test_labels_of_the_real_rows_do_not_overlap() -> None:
    for plot in plots.plots(build(real_rows())):
        assert overlaps(plot.wide) == [] and overlaps(plot.narrow) == [], plot.name


def test_a_regression_is_told_with_what_changed() -> None:
    def night(day: int) -> Row:
        rate = 100.0 if day < 10 else 85.0
        versions = {"engine": "1.0" if day < 10 else "1.1", "commit": f"{day:02}cafe"}
        started = f"2026-11-{day:02}T00:00:00Z"
        return a_row(step_s=[[1 / rate, 1 / rate]] * 3, versions=versions, started_at=started, key=str(day))

    rows = [night(day) for day in range(1, 21)]
    series = series_of(rows)
    text = page.page(build(rows), series, steps_of(series[0]))
    assert "Regressions" in text and "engine 1.0 → 1.1" in text and "commit 09cafe → 10cafe" in text
    assert "-15.0 %" in text and "2026-11-10</time>" in text
    assert 'id="plot-history-decode_tok_s"' in text


def test_extremes_can_be_drawn() -> None:
    for values in ([1e-12, 1e12], [5.0, 5.0], [1e300, 1e-300]):
        marks = [charts.Mark(f"r{i}", f"m{i}", 0, x=v, y=v) for i, v in enumerate(values)]
        for width in (svg.WIDE, svg.NARROW):
            for log in (True, False):
                axes = svg.Axis("x", log=log), svg.Axis("y", log=log)
                drawn = charts.scatter(marks, ["e"], *axes, "t", True, width)
                xml.fromstring(svg.standalone(drawn))
                assert "nan" not in drawn and "inf" not in drawn


def test_the_command_writes_page_and_plots(tmp_path: Path) -> None:
    for row in a_house(9):
        store.append(tmp_path, "desk", row)
    where = ["-o", str(tmp_path / "out" / "page.html"), "--plots", str(tmp_path / "plots")]
    done = command("report", "--results", str(tmp_path), *where)
    assert done.returncode == 0, done.stderr
    assert "<table id=rows>" in (tmp_path / "out" / "page.html").read_text()
    names = sorted(path.name for path in (tmp_path / "plots").glob("*.svg"))
    assert names == ["choice.svg", "divergence.svg", "latency.svg", "memory.svg", "quality-size.svg"]
    xml.parse(tmp_path / "plots" / names[0])
    empty = command("report", "--results", str(tmp_path / "none"), folder=tmp_path)
    assert empty.returncode == 2 and "nothing measured yet" in empty.stderr
    assert not (tmp_path / "report.html").exists()


def test_too_many_to_choose_from_are_a_page_all_the_same() -> None:
    text = page.page(build([a_row(str(number)) for number in range(301)]))
    assert "id=answer" not in text and text.count("<tr data-r=") == 301


def test_png_of_a_plot() -> None:
    made = svg.png(svg.standalone(plots.plots(build(a_house(9)))[0].wide))
    assert made is not None and made.startswith(b"\x89PNG")


def test_other_evaluation_sets_and_tasks_have_columns() -> None:
    rows = []
    for variant, total in (("base", 8.0), ("q", 8.4)):
        row = a_row(variant)
        assert row.measurement is not None and row.evaluation is not None
        windows = [{"count": 4, "nonfinite": 0, "nll_sum": total}, {"count": 4, "nonfinite": 0, "nll_sum": 9.0}]
        rows.append(
            replace(
                row,
                evaluations=row.evaluations | {"code": replace(row.evaluation, name="code", digest="e9")},
                measurement=replace(
                    row.measurement,
                    qualities=row.measurement.qualities | {"code": {"windows": windows}},
                    tasks={"facts": {"correct": [1.0, 1.0, 1.0, float(variant == "base")]}},
                ),
                tasks={"facts": Task("facts", "t.json", "t", 4, 9)},
            )
        )
    table = build(rows)
    text = page.page(table)
    for heading in ("perplexity, code", "Δ perplexity, code", "facts", "Δ facts"):
        assert f">{heading}" in text
    assert 'data-v="-0.25">-25.0 <small>' in text
    value = table.sets["code"].lines[1].values["perplexity"]
    assert value == pytest.approx(math.exp(17.4 / 8)) and f'data-v="{value!r}"' in text
