"""The package as a library: light to import, typed objects out, the command line's numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import workbench as wb
from tests.bench import Bench
from tests.command import command
from tests.places import ROOT
from workbench.errors import UserError
from workbench.records import Row

PUBLISHED = ROOT / "results"
TINY = ROOT / "recipes" / "tiny.yaml"


def said_by(program: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **environment},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_to_import_it_imports_nothing_else() -> None:
    """Not its own functions before one is asked for, and no library before one is called."""
    program = (
        "import sys, typing, __future__; old = {*sys.modules}; import workbench as wb; new = {*sys.modules} - old\n"
        "wb.run; print(new, sorted(name for name in sys.modules if name.startswith('workbench')), sep='\\n')"
    )
    imported, for_a_function = said_by(program).splitlines()
    assert imported == "{'workbench'}"
    assert for_a_function == "['workbench', 'workbench.api', 'workbench.errors']"


def test_a_function_is_not_hidden_by_the_folder_of_its_name() -> None:
    program = (
        "import workbench.plan.make, workbench.quantize.make, workbench.profile.jobs, workbench as wb;"
        "from workbench.plan import make; print(*map(callable, (wb.plan, wb.quantize, wb.profile, make.make)))"
    )
    assert said_by(program) == "True True True True"


def test_every_name_is_there_and_no_other() -> None:
    assert set(dir(wb)) == set(wb.__all__) and all(getattr(wb, name) for name in wb.__all__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        wb.quantise  # noqa: B018


def test_a_table_is_what_the_command_prints() -> None:
    words = ("--results", str(PUBLISHED), "--recipe", "smollm2-135m-full")
    table = wb.table(PUBLISHED, recipe="smollm2-135m-full")
    assert command("table", *words, "--format", "markdown").stdout == table._repr_markdown_()
    assert len(repr(table)) < 100, "a notebook stores it too"
    assert str(table) == command("table", *words).stdout and "gguf-Q4_K_M" in str(table)
    rows = wb.rows(PUBLISHED)
    assert all(isinstance(row, Row) for row in rows) and len(wb.rows(PUBLISHED, history=True)) >= len(rows)
    assert str(wb.table(rows, recipe="smollm2-135m-full")) == str(table), "rows in hand are as good as stored ones"


def test_a_data_frame_has_the_numbers_of_the_json() -> None:
    words = ("--results", str(PUBLISHED), "--recipe", "smollm2-135m-full", "--format", "json")
    records = json.loads(command("table", *words).stdout)
    frame = wb.table(PUBLISHED, recipe="smollm2-135m-full").to_pandas()
    assert len(frame) == len(records) > 20
    for name in ("perplexity", "kld_mean", "decode_tok_s", "peak_vram_bytes", "perplexity_delta_se"):
        assert frame[name].dtype == "float64"
        assert [*frame[name].dropna()] == [record[name] for record in records if record[name] is not None]
    assert [*frame["decode_tok_s_ci_low"].dropna()] == [
        r["decode_tok_s_ci"][0] for r in records if r["decode_tok_s_ci"]
    ]
    best = frame.groupby("variant")["decode_tok_s"].max()
    for name in best.index:
        assert best[name] == max(r["decode_tok_s"] or 0 for r in records if r["variant"] == name)


def test_without_pandas_it_says_what_to_install() -> None:
    table = wb.table(PUBLISHED)
    with (
        patch.dict(sys.modules, {"pandas": None}),
        pytest.raises(wb.UserError, match=r'Install it with: pip install "quant-workbench\[pandas\]"'),
    ):
        table.to_pandas()


def test_a_recommendation_is_what_the_command_prints() -> None:
    limits = ("--memory", "8GiB", "--max-perplexity", "5%", "--min-decode", "20")
    found = wb.recommend(PUBLISHED, memory="8GiB", max_perplexity="5%", min_decode=20)
    assert found.choice and found.command and str(found) == command("recommend", str(PUBLISHED), *limits).stdout
    assert wb.recommend(PUBLISHED, memory=8 * 2**30, max_perplexity="5%", min_decode=20) == found
    assert wb.recommend(PUBLISHED, memory=1).choice is None


@pytest.mark.parametrize(
    "wish, said",
    [
        ({"max_kld": -1}, "max_kld -1: a limit is zero or more"),
        ({"min_accuracy": {"arithmetic": float("nan")}}, "min_accuracy nan: a limit is zero or more"),
        ({"min_decode": -5}, "min_decode -5: a limit is zero or more"),
        ({"min_accuracy": "60%"}, "min_accuracy '60%': a limit is a number, as 0.6 for 60 %"),
        ({"sort": "quaility"}, "unknown order 'quaility'. Did you mean 'quality'?"),
    ],
)
def test_a_wish_that_nothing_could_keep_is_refused(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        wb.recommend(PUBLISHED, **wish)


def test_two_sets_of_rows_are_compared_as_the_command_does() -> None:
    file = str(sorted(PUBLISHED.glob("*/rows.jsonl"))[0])
    found = wb.compare(file, wb.rows(file, history=True))
    assert found.changes and not found.lost
    assert str(found) == command("compare", file, file).stdout
    with pytest.raises(wb.UserError, match="no row of that date"):
        wb.compare("2001-01-01", file, PUBLISHED)
    with pytest.raises(wb.UserError, match="nothing measured yet"):
        wb.compare("2001-01-01", file, [])


def test_what_is_wrong_is_said_as_the_command_says_it() -> None:
    with pytest.raises(wb.UserError, match="nothing measured yet"):
        wb.table([])
    with pytest.raises(wb.UserError, match=r"^nowhere: nothing measured yet, there is no such file or folder\. Name"):
        wb.table("nowhere")
    for made in (wb.run, wb.quantize):
        with pytest.raises(wb.UserError, match=r"^machines \(h100, l40s\) are a cluster's.*add --on ray$"):
            made(TINY, machines=["h100", "l40s"])
    with pytest.raises(wb.UserError, match="no such recipe"):
        wb.load("recipes/tinny.yaml")
    assert wb.load(wb.load(TINY)).name == "tiny"


def test_a_stored_line_that_is_none_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("not a row\n")
    with pytest.warns(UserWarning, match="rows.jsonl:1"):
        assert wb.rows(str(tmp_path)) == []


@pytest.mark.slow
def test_a_run_returns_what_it_made_measured_and_what_failed(bench: Bench) -> None:
    """In an interpreter of its own, as a program would."""
    recipe = bench.recipe(variants=[{"gguf": "Q8_0"}, {"gguf": "Q4_0"}])
    program = (
        "import workbench as wb, json\n"
        f"done = wb.run({recipe!r}, {str(bench.results)!r}, variants=['gguf-Q8_0'])\n"
        f"made = wb.quantize({recipe!r}, variants=['*Q4_0'])\n"
        f"again = wb.profile(None, {str(bench.results)!r}, backends=['fake'])\n"
        "assert str(done) == str(done.table)\n"
        "print(json.dumps([[row.artifact.variant for row in done.rows], done.failures, len(done.table.lines),"
        "sorted(made.artifacts), [artifact.format for artifact in made.artifacts['gguf-Q4_0']], len(again.rows)]))"
    )
    rows, failures, lines, made, formats, again = json.loads(said_by(program, **bench.environment()))
    assert (rows, failures, lines) == (["base", "gguf-Q8_0"], {}, 2)
    assert made == ["base", "gguf-Q4_0"] and formats == ["gguf"] and again == 3


@pytest.mark.slow
def test_a_plan_is_what_the_command_prints(bench: Bench) -> None:
    program = f"import workbench as wb; print(wb.plan({str(TINY)!r}, memory='2GiB', context=256, device='cpu'))"
    words = ("plan", str(TINY), "--memory", "2GiB", "--context", "256", "--device", "cpu")
    # How much of the disk is free is another number whenever somebody writes.
    here, there = (
        re.sub(r"[\d.]+ \w+ free", "", said)
        for said in (said_by(program, **bench.environment()), bench(*words).stdout.strip())
    )
    assert here == there and "disk for all of it" in here
