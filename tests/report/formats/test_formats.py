"""The four formats: right numbers, aligned, escaped, readable at the widths people have."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tests.places import ROOT
from tests.rows import a_row, compared, demo_rows, wide_rows
from workbench.errors import UserError
from workbench.records import Evaluation, Row, Workload
from workbench.report.formats import FORMATS
from workbench.report.formats.data import objects
from workbench.report.formats.terminal import terminal
from workbench.report.table import Table, build

NASTY = "Q4|[red]x[/red] <b>*a*</b> `c` \x1b[31m\u202e_e_\nnext"


def nasty_rows() -> list[Row]:
    return [
        a_row(base=f"base {NASTY}"),
        a_row(NASTY, base=f"base {NASTY}", warnings=[f"warned {NASTY}"]),
        a_row("other", base=f"base {NASTY}", measured=False, error="\ud800 half a character\nTraceback\n" + "x" * 5000),
    ]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "rows",
    [
        *(wide_rows(), nasty_rows(), demo_rows(), [a_row(measured=False, error="it died")]),
        [a_row("q", measured=False, unsupported="no GGUF here")],
    ],
)
def test_every_format_takes_every_table_and_can_be_encoded(name: str, rows: list[Row]) -> None:
    text = FORMATS[name](build(rows))
    assert text.endswith("\n")
    text.encode()
    assert not re.search(r"\bnan\b|\bNone\b", text)
    if name in ("terminal", "markdown"):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)


def test_json_is_the_objects() -> None:
    table = build(wide_rows())

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(FORMATS["json"](table), parse_constant=refuse) == objects(table)


def test_csv_is_the_objects_too() -> None:
    table = build(nasty_rows())
    records = list(csv.DictReader(io.StringIO(FORMATS["csv"](table))))
    expected = objects(table)
    assert [record["variant"] for record in records] == [each["variant"] for each in expected]
    assert float(records[1]["perplexity"]) == expected[1]["perplexity"]
    assert float(records[1]["prefill_tok_s_ci_low"]) == expected[1]["prefill_tok_s_ci"][0]
    assert records[1]["warnings"] == f"warned {NASTY}"
    assert records[2]["perplexity"] == records[2]["decode_tok_s_ci_high"] == ""
    assert "Traceback\nxxxx" in records[2]["error"]


def test_csv_reads_into_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.StringIO(FORMATS["csv"](build(wide_rows()))))
    assert len(frame) == 27
    assert frame["perplexity"].dtype == float
    assert frame["perplexity"].isna().sum() == 8


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_is_aligned_and_escaped() -> None:
    text = FORMATS["markdown"](build(nasty_rows()))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert len({len(cells_of(line)) for line in lines}) == 1
    cell = cells_of(lines[3])[0]
    assert cell == r"Q4\|\[red\]x\[/red\] &lt;b&gt;\*a\*&lt;/b&gt; \`c\` " + "\N{REPLACEMENT CHARACTER}" + r"\_e\_ next"
    assert cells_of(lines[4])[7:] == ["failed", "–", "–", "2"]
    assert "\n1. warned " in text and "\n2. " in text
    assert max(map(len, text.splitlines())) < 700  # five thousand x are not shown
    rule = cells_of(lines[1])
    assert all(re.fullmatch("-+:?", part) for part in rule) and rule[2].endswith(":") and rule[0].endswith("-")


def test_markdown_has_units_and_shorthand() -> None:
    text = FORMATS["markdown"](build(wide_rows()))
    heading = cells_of(next(line for line in text.splitlines() if line.startswith("|")))
    assert heading == [
        "variant",
        "backend",
        "bpw",
        "size (MiB)",
        "load (s)",
        "peak RSS (MiB)",
        "pp100 (t/s)",
        "tg3 @ d100 (t/s)",
        "ppl",
        "Δ ppl",
    ]
    assert len(lines_of(text)) == 20, "a pair that cannot run has no line"
    assert re.search(r"\| gguf-Q8_0 +\| llamacpp .*\| +92\.0 \| +1\.5 \| +913\.0 \|", text)
    assert "noise floor: Toy-1M has perplexity 11.6672 to 11.6672 on transformers, vllm, llamacpp: 0.000 %" in text


def lines_of(text: str) -> list[str]:
    """The lines of rows, of a terminal's table or of markdown's."""
    return [line for line in text.splitlines() if re.search(r"^(\| )?\S* +\|? ?(transformers|vllm|llamacpp) +", line)]


@pytest.mark.parametrize("width", [100, 120, 140])
def test_the_terminal_fits_and_cuts_no_number(width: int) -> None:
    table = build(wide_rows())
    text = terminal(table, (), width)
    assert max(map(len, text.splitlines())) <= width
    ran = [line for line in table.lines if not line.row.unsupported]
    for line, row in zip(ran, lines_of(text)[: len(ran)], strict=True):
        shown = [float(number) for number in re.findall(r"(?<= )\d+\.\d+", row)]
        for name in ("decode_tok_s", "perplexity", "prefill_tok_s"):
            value = line.values[name]
            assert value is None or any(abs(number - value) <= 0.051 for number in shown)
    assert "…" not in text and len(ran) == 19
    left_out = re.search(rf"^left out at {width} columns: (.*) \(", text, re.MULTILINE)
    assert (left_out[1] if left_out else "") == {100: "size, load", 120: "", 140: ""}[width]


@pytest.mark.parametrize("width", range(80, 121))
def test_no_line_of_the_table_is_wider_than_the_terminal(width: int) -> None:
    """Also with a further set, an axis of options and long names: divergence, decode and their intervals stay."""
    long = "awq-4bit-g128-compensated"
    rows = [compared(row, 0.01) if row.measurement else row for row in wide_rows()]
    rows += [
        compared(a_row(long, options={"kv_cache": kv}, windows=[(2560, 6300.0)] * 2, key=kv), 0.2)
        for kv in ("f16", "q8_0")
    ]
    text = terminal(build(rows), (), width)
    assert max(map(len, text.splitlines())) <= width
    grid = text.split("\n\n")[1]
    assert "KLD" in grid and "kv_cache" in grid and " size " not in grid
    left_out = text.replace("\n", " ").partition(f"left out at {width} columns: ")[2].partition(" (all of it")[0]
    assert left_out.startswith(("bpw, size, load", "size, load")) and " KLD" not in left_out.replace("± of KLD", "")


def test_names_are_cut_before_a_line_is_wrapped() -> None:
    table = build([a_row(), a_row("n" * 90)])
    text = terminal(table, (), 80)
    assert max(map(len, text.splitlines())) == 80 and re.search(r"^n+…n+ +llamacpp", text, re.MULTILINE)


def test_any_number_can_be_asked_for() -> None:
    table = build(compared_rows())
    names = ["kld_p99", "ttft_s", "noise_floor.low", "disk_bytes"]
    text = terminal(table, names, 120)
    assert re.search(r"^variant +backend +kld_p99 +ttft_s +noise_floor.low +disk_bytes$", text, re.MULTILINE)
    assert re.search(r"^base +transformers +– +0.5 s +11.67 +1.9 MiB$", text, re.MULTILINE)
    assert re.search(r"\| kld_p99 \| +ttft_s \|", FORMATS["markdown"](table, names))
    assert FORMATS["csv"](table, names).splitlines()[0] == "variant,backend,kld_p99,ttft_s,noise_floor.low,disk_bytes"
    assert json.loads(FORMATS["json"](table, names))[0].keys() == {"variant", "backend", *names}
    with pytest.raises(UserError, match="unknown column 'kld_p98'. Did you mean 'kld_p99'"):
        FORMATS["terminal"](table, ["kld_p98"])


def compared_rows() -> list[Row]:
    """The wide table with divergences, as recipes with a reference have."""
    klds = iter([0.0, 3.1e-9, 4e-4, 0.0123, 0.2, 1.5, 12.0] * 4)
    return [compared(row, next(klds)) if row.measurement else row for row in wide_rows()]


def test_divergence_and_intervals_go_last_where_it_is_narrow() -> None:
    table = build(compared_rows())
    texts = {width: terminal(table, (), width) for width in (170, 100, 80, 50)}
    heads = {width: " ".join(text.split("\n\n")[1].split("─")[0].split()) for width, text in texts.items()}
    for width, text in texts.items():
        assert max(map(len, text.splitlines())) <= width
    assert "load" in heads[170] and "same top" in heads[170] and "left out" not in texts[170]
    assert not {"load", "size", "same"} & {*heads[100].split()} and "KLD" in heads[100] and "%" in texts[100]
    assert {"tg3", "KLD", "ppl"} <= {*heads[80].split()} and "peak" not in heads[80]
    assert {"tg3", "KLD"} <= {*heads[50].split()} and "ppl" not in heads[50]
    assert re.search(r" 3\.1e-09 ±0\.0e\+00  50\.00 ±0\.00$", texts[170], re.MULTILINE)


def test_the_marks_and_columns_are_explained_where_they_are() -> None:
    text = FORMATS["markdown"](build(compared_rows()))
    heading = cells_of(next(line for line in text.splitlines() if line.startswith("|")))
    assert heading[-4:] == ["ppl", "Δ ppl", "KLD", "same top (%)"]
    assert "KLD: mean divergence from the base, nats a token; same top: its likeliest token is the base's" in text
    assert "noise floor: divergence of Toy-1M from its own reference: transformers 0, vllm " in text
    plain = FORMATS["markdown"](build(demo_rows()))
    assert "KLD" not in plain and "same top" not in plain


def test_a_delta_in_the_noise_is_marked_and_the_mark_explained() -> None:
    rows = [a_row(windows=[(400, 900.0)] * 3), a_row("q", windows=[(400, 901.0), (400, 899.0), (400, 900.5)])]
    text = FORMATS["terminal"](build(rows))
    assert re.search(r"q +llamacpp .* ~\+0\.004 ±0\.014$", text, re.MULTILINE)
    assert "~: not to be told from the base, by divergence or perplexity: engines or texts differ as much" in text
    rows[1] = a_row("q", windows=[(400, 901.0), (400, 901.01), (400, 901.02)])
    text = FORMATS["terminal"](build(rows))
    assert "~" not in text and " +0.024 ±0.000" in text


@pytest.mark.parametrize(
    ("score", "windows", "scored", "said"),
    [
        ("second-half", 20, 5100, "20 windows of 512 tokens, second-half scored (llama.cpp's convention), 5100 tokens"),
        ("all", 20, 10220, "20 windows of 512 tokens, all scored (the papers' convention), 10220 tokens"),
        ("strided", 5, 511 + 4 * 128, "5 windows of 512 tokens, strided by 128 scored, 1023 tokens"),
        ("strided", 1, 511, "1 windows of 512 tokens, strided scored, 511 tokens"),
    ],
)
def test_the_table_names_its_convention(score: str, windows: int, scored: int, said: str) -> None:
    row = replace(a_row(), evaluations={"prose": Evaluation("prose", "e.json", "e1", 512, score, windows, scored)})
    for name in ("terminal", "markdown"):
        assert f"perplexity: prose, {said}" in FORMATS[name](build([row]))


def test_a_terminal_that_is_too_narrow_still_shows_whole_numbers() -> None:
    narrow, wide = (lines_of(terminal(build(wide_rows()), (), width)) for width in (20, 200))
    for one, other in zip(narrow, wide, strict=True):
        assert {*re.findall(r"\d+\.\d+", one)} < {*re.findall(r"\d+\.\d+", other)}


def test_the_terminal_shows_names_as_they_are_and_reasons_once() -> None:
    text = terminal(build(nasty_rows()), (), 200)
    assert "Q4|[red]x[/red] <b>*a*</b> `c` " in text
    assert "[1] warned Q4|[red]x[/red]" in text
    text = terminal(build(demo_rows()), (), 120)
    assert text.count("vLLM has no GGUF on a CPU") == 1
    assert "vllm cannot run Q2_K, Q8_0: vLLM has no GGUF on a CPU\n" in text and "[3]" not in text
    assert len(re.findall(r"failed( +–)+ +1$", text, re.MULTILINE)) == 1


def test_a_real_terminal_gets_colour_and_its_width() -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tests.rows import wide_rows\n"
        "from workbench.report.formats import FORMATS\n"
        "from workbench.report.table import build\n"
        "sys.stdout.write(FORMATS['terminal'](build(wide_rows())))"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-P", "-c", script, str(ROOT)]
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 65536):
            seen += block
    except OSError:  # how a pty says that its other end is closed
        pass
    assert process.wait(timeout=30) == 0
    os.close(ours)
    text = seen.decode()
    assert "\x1b[1m" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in plain.splitlines()) <= 100
    assert plain.count("vllm cannot run gguf-Q8_0, gguf-Q6_K") == 1


def test_a_pipe_gets_plain_text_of_full_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = FORMATS["terminal"](build(wide_rows()))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) > 100


@pytest.mark.parametrize(
    ("size", "unit", "shown"), [(3 * 2**30, "GiB", "3.0"), (5 * 2**20, "MiB", "5.0"), (40_000, "KiB", "39.1")]
)
def test_one_unit_a_column(size: int, unit: str, shown: str) -> None:
    row = a_row()
    text = FORMATS["markdown"](build([replace(row, artifact=replace(row.artifact, disk_bytes=size))]))
    assert f"size ({unit})" in text
    assert f" {shown} |" in text


def test_vram_is_a_column_where_there_is_some() -> None:
    memory: dict[str, Any] = {"peak_rss": 2**30, "peak_vram": 0}
    assert "VRAM" not in FORMATS["markdown"](build([a_row(memory=memory)]))
    assert "peak VRAM (GiB)" in FORMATS["markdown"](build([a_row(memory=memory | {"peak_vram": 7 * 2**30})]))


def test_workloads_that_vary_are_a_column_not_a_heading() -> None:
    longer = replace(
        a_row(measured=False, error="too long"), workload=Workload(prompt_tokens=[200], new_tokens=3, batches=[4])
    )
    text = FORMATS["markdown"](build([a_row(), longer]))
    assert "| workload     |" in text and "prefill (t/s)" in text
    assert "pp200 tg3 b4" in text


def test_settings_shared_by_a_backends_lines_are_told() -> None:
    def with_settings(row: Row, **settings: Any) -> Row:
        assert row.measurement is not None
        return replace(row, measurement=replace(row.measurement, settings=settings))

    rows = [
        with_settings(a_row(), threads=2, dtype="bf16", score_s=1.25),
        with_settings(a_row("q"), threads=2, dtype="q", score_s=1.5),
    ]
    assert "llamacpp: threads 2\n" in FORMATS["markdown"](build(rows))


def test_formats_are_a_literal_registry() -> None:
    assert list(FORMATS) == ["terminal", "markdown", "csv", "json"]
    table: Table = build([a_row()])
    assert all(isinstance(render(table), str) for render in FORMATS.values())
