"""What programs read: every number that was measured, and what tells two rows apart."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest

from tests.rows import a_row, compared
from workbench.records import Evaluation, Row, Served, Speed, Task
from workbench.report.formats import FORMATS
from workbench.report.formats.data import flattened, objects
from workbench.report.formats.parquet import parquet
from workbench.report.table import build


def on(row: Row, **changed: Any) -> Row:
    assert row.measurement is not None
    return replace(row, measurement=replace(row.measurement, **changed))


def an_axis() -> list[Row]:
    """Two rows of one variant that differ in the cache's type alone."""
    rows = [a_row("q", options={"kv_cache": kv, "mmap": True}, key=kv) for kv in ("f16", "q8_0")]
    return [on(row, settings={"threads": 2, "features": ["AVX"], "kv_cache": row.options["kv_cache"]}) for row in rows]


def rich_rows() -> list[Row]:
    """A base and a variant with a further set, a further prompt length, served requests and a task."""
    found = []
    for name, worse in (("base", 0.0), ("q", 0.5)):
        row = compared(a_row(name, windows=[(4, 8.0 + worse), (4, 10.0 + worse)]), 0.1 * worse)
        assert row.measurement is not None and row.quality is not None
        speeds = [*row.measurement.speeds, Speed(200, 3, 1, [1.0, 1.1], [[0.1, 0.1]] * 2, [[1, 1]] * 2)]
        measured = on(
            row,
            speeds=speeds,
            served=[Served(4, 100, [3, 3], [2.0, 2.2], continuous=False)],
            qualities=row.measurement.qualities | {"code": row.quality},
            tasks={"facts": {"correct": [1.0, 1.0, 1.0, 1.0 if name == "base" else 0.0]}},
        )
        code = Evaluation("code", "c.json", "c1", 8, "second-half", 2, 8)
        asked = {"facts": Task("facts", "t.json", "t1", 4, 9)}
        found.append(replace(measured, evaluations=row.evaluations | {"code": code}, tasks=asked))
    return found


def test_rows_of_an_axis_differ_in_what_was_asked_and_not_only_in_their_key() -> None:
    one, other = (flattened(record) for record in objects(build(an_axis())))
    apart = {name for name in one if one[name] != other[name]}
    assert apart == {"key", "options.kv_cache", "settings.kv_cache"}
    records = list(csv.DictReader(io.StringIO(FORMATS["csv"](build(an_axis())))))
    assert [record["options.kv_cache"] for record in records] == ["f16", "q8_0"]
    told = json.loads(FORMATS["json"](build(an_axis())))
    assert [each["options"] for each in told] == [{"kv_cache": kv, "mmap": True} for kv in ("f16", "q8_0")]
    assert told[0]["settings"] == {"threads": 2, "kv_cache": "f16"}


def test_a_file_has_the_options_too(tmp_path: Any) -> None:
    table = pytest.importorskip("pyarrow.parquet").read_table(io.BytesIO(parquet(an_axis())))
    assert table.column("options.kv_cache").to_pylist() == ["f16", "q8_0"]
    assert str(table.schema.field("settings.threads").type) == "int64"
    words = [*an_axis(), a_row("r", "vllm", options={"mmap": "auto"})]
    mixed = pytest.importorskip("pyarrow.parquet").read_table(io.BytesIO(parquet(words)))
    assert mixed.column("options.mmap").to_pylist() == ["True", "True", "auto"]


FURTHER = {
    "points.pp200.median": 190.909,
    "points.tg3 @ d200.ci_low": 10.0,
    "points.served b4 by groups.median": 2.864,
    "evaluations.code.perplexity_delta": 1.264,
    "evaluations.code.kld_mean": 0.05,
    "evaluations.code.kld_mean_se": 0.0,
    "tasks.facts.accuracy": 0.75,
    "tasks.facts.accuracy_delta": -0.25,
}
"""Of the variant of `rich_rows`."""


def test_what_was_measured_beside_the_headline_is_in_every_form_of_data() -> None:
    table = build(rich_rows())
    frame = table.to_pandas()
    file = pytest.importorskip("pyarrow.parquet").read_table(io.BytesIO(parquet(rich_rows()))).to_pylist()
    records = list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))
    for name, value in FURTHER.items():
        near = pytest.approx(value, abs=1e-3)
        assert float(records[1][name]) == file[1][name] == frame[name][1] == near, name
        assert frame[name].dtype == "float64"
    assert json.loads(FORMATS["json"](table))[1]["points"]["pp200"]["median"] == pytest.approx(190.909, abs=1e-3)


def test_text_below_the_table_tells_rows_of_an_axis_apart() -> None:
    first, second = rich_rows()
    rows = [replace(row, options={"kv_cache": kv}) for row in (first, second) for kv in ("f16", "q8_0")]
    text = " ".join(FORMATS["markdown"](build([*rows, compared(a_row("base", "vllm"), 0.002)])).split())
    for kv in ("f16", "q8_0"):
        assert f"q on llamacpp (kv_cache {kv}), t/s: pp200" in text
    assert "reference: llamacpp (kv_cache f16) " in text and ", llamacpp (kv_cache q8_0) " in text


def test_a_printed_table_has_them_too_and_says_what_their_names_mean() -> None:
    for name in ("terminal", "markdown"):
        text = " ".join(FORMATS[name](build(rich_rows())).replace("\\", "").split())
        assert "q on llamacpp, t/s: pp200 190.9 ±83.0%, tg3 @ d200 10.0 ±0.0%, served b4 by groups 2.9 ±83.0%" in text
        assert "there ppN: reading N prompt tokens; tgN @ dM: writing N tokens after M; bN: N sequences at once" in text
        assert "served: new tokens of requests" in text and "by groups: the next begin when all of a group have" in text
        assert "t/s: tokens a second of one sequence. pp100: reading a prompt of 100; tg3 @ d100: writing 3" in text
    heading = next(line for line in FORMATS["markdown"](build(rich_rows())).splitlines() if line.startswith("|"))
    assert "code (Δ ppl) |" in heading and "code (KLD) |" in heading and "facts (Δ acc) |" in heading


def test_what_stands_below_the_table_is_in_the_data() -> None:
    rows = [*rich_rows(), a_row("base", "vllm", windows=[(4, 8.1), (4, 10.1)]), a_row(machine="lab", started_at="2025")]
    first, *_, last = json.loads(FORMATS["json"](build(rows)))
    assert "1 row not shown: of another machine (lab)" in first["notes"]
    assert first["noise_floor"]["low"] == first["perplexity"] < first["noise_floor"]["high"]
    assert first["noise_floor"]["kld"] == {"llamacpp": 0.0}
    assert last["evaluations"]["code"]["noise_floor"] == {"low": None, "high": None, "kld": {}}
