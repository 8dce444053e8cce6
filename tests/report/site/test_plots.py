"""What plots show: nothing adds up that never was at one time, quality with its own interval, versions in the history;
and what columns a table has for who asks."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.rows import a_row, compared
from workbench.records import Served, Speed
from workbench.report.site import plots
from workbench.report.site.columns import columns
from workbench.report.site.page import page
from workbench.report.site.plots import Plot
from workbench.report.site.words import full_name
from workbench.report.table import build
from workbench.report.verdicts.steps import series_of

MIB = 2**20


def named(found: list[Plot]) -> dict[str, Plot]:
    return {plot.name: plot for plot in found}


def test_peaks_of_different_moments_are_not_stacked() -> None:
    memory = {
        "weights": 365 * MIB,
        "embedding": 54 * MIB,  # a part of the weights
        "kv_cache": 16 * MIB,
        "kv_cache_reserved": 64 * MIB,
        "allocated_peak": 500 * MIB,
        "peak_rss": 1735 * MIB,
        "peak_rss_anon": 1500 * MIB,
        "peak_rss_file": 871 * MIB,
    }
    plot = named(plots.plots(build([a_row(memory=memory)])))["memory"]
    shown = [float(value) / MIB for value in re.findall(r'data-x="([^"]+)"', plot.wide)]
    assert shown == [365, 64, 1735]
    lefts, tops = (
        [float(each) for each in re.findall(rf'<rect class="p\d+"[^>]* {axis}="([^"]+)"', plot.wide)] for axis in "xy"
    )
    lefts, tops = lefts[-3:], tops[-3:]
    assert tops[0] == tops[1] < tops[2] and lefts[0] == lefts[2] < lefts[1], "a bar of its own, from the same edge"
    assert "peak seen on the host" in plot.wide and "peak_rss" not in plot.wide and "1,735" not in plot.caption


def test_quality_is_divergence_and_without_one_the_paired_difference() -> None:
    rows = [a_row(), a_row("q", windows=[(4, 8.4), (4, 10.4), (4, 9.4)])]
    axis = named(plots.plots(build(rows)))["choice"]
    assert axis.title.startswith("Perplexity lost") and "paired" in axis.caption
    delta = build(rows).lines[1].delta
    assert delta is not None and f'data-y="{delta.value!r}"' in axis.wide
    # Its interval is the difference's, far narrower than that of the perplexity.
    assert "perplexity more than the base" in axis.wide
    better = named(plots.plots(build([compared(rows[0], 0.0), compared(rows[1], 0.25)])))["choice"]
    assert better.title.startswith("Divergence") and 'data-y="0.25"' in better.wide
    assert {plot.name for plot in plots.plots(build(rows))}.isdisjoint({"quality-speed"})


def test_a_history_says_where_versions_changed() -> None:
    nights = [
        a_row(
            versions={"llama-cpp-python": "0.3.35" if day < 5 else "0.3.36", "commit": f"{day}"},
            started_at=f"2026-11-{day:02}T02:00:00Z",
            key=str(day),
        )
        for day in range(1, 10)
    ]
    series = series_of(nights)
    assert plots.version_steps(series) == [("2026-11-05", "llama-cpp-python 0.3.35 → 0.3.36")]
    plot = named(plots.plots(build(nights), series))["history-decode_tok_s"]
    assert plot.key == ("2026-11-05: llama-cpp-python 0.3.35 → 0.3.36",)
    assert plot.wide.count('<path class="k"') == 1


def test_further_lengths_batches_and_requests_are_columns_for_who_asks() -> None:
    row = a_row()
    assert row.measurement is not None
    long = Speed(2048, 3, 1, [1.0, 1.0], [[0.1, 0.1]] * 2, [[1, 1]] * 2)
    wide = Speed(100, 3, 8, [1.0, 1.0], [[0.1, 0.1]] * 2, [[8, 8]] * 2)
    served = Served(8, 100, [10, 20], [2.0, 2.0], True)
    more = replace(row.measurement, speeds=[*row.measurement.speeds, long, wide], served=[served])
    table = build([replace(row, measurement=more)])
    found = {column.name: column for column in columns(table)}
    values = {name: found[name].value(table.lines[0]) for name in ("pp2048", "tg3 @ d100 b8", "served b8")}
    assert values == {"pp2048": 2048, "tg3 @ d100 b8": pytest.approx(80), "served b8": 15}
    assert {found[name].shown for name in values} == {"asked"}
    assert all("tokens a second" in found[name].help.lower() for name in values)


def test_quality_stands_beside_speed() -> None:
    names = [column.name for column in columns(build([compared(a_row(), 0.0), compared(a_row("q"), 0.1)]))]
    place = names.index("decode_tok_s")
    assert names[place + 1] == "kld_mean" and place < 4


def test_a_name_says_what_tells_a_line_from_another_and_no_more() -> None:
    """What is the same for all lines of a variant and engine only takes room from the other names."""
    kinds = {"q f16": "f16", "q q8_0": "q8_0", "p": "f16"}
    table = build([a_row(key[0], key=key, options={"kv_cache": kind}) for key, kind in kinds.items()])
    names = {"p on llama.cpp", "q · f16 on llama.cpp", "q · q8_0 on llama.cpp"}
    assert {full_name(table, line) for line in table.lines} == names
    engines = {"llama.cpp", "llama.cpp · f16", "llama.cpp · q8_0"}
    assert set(re.findall(r'data-engine="([^"]+)"', page(table))) == engines
