"""A run's progress: figures as they come, how many jobs are left, and what an interrupt leaves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.bench import Bench
from tests.rows import REAL, a_row, compared
from workbench.console import Growing
from workbench.profile.outlook import Outlook
from workbench.records import Row
from workbench.report import store
from workbench.report.formats.terminal import so_far
from workbench.report.selection import engine_texts
from workbench.report.table import build


class Screen:
    """What is said, and what stands below and above the bar where one is drawn."""

    def __init__(self, live: bool = False) -> None:
        self.whole, self.said, self.live = "", list[str](), live
        self.table: Growing | None = None
        self.kept: bool | None = None

    def say(self, text: str) -> None:
        self.said.append(text)

    def task(self, text: str, told: bool = True) -> SimpleNamespace:
        raise NotImplementedError

    def put_away(self, keep: bool) -> None:
        self.whole, self.kept = "", keep


def test_each_row_tells_its_figures_and_how_much_is_left() -> None:
    screen, moment = Screen(), 0.0
    rows = [compared(a_row("gguf-Q4_0"), 0.25), a_row("base", "transformers"), a_row("base", "vllm", measured=False)]
    outlook = Outlook(rows, engine_texts(rows), screen, lambda: moment)
    assert screen.whole == "0 of 3 jobs"
    moment = 20.0
    outlook.waiting(2)
    assert screen.whole == "0 of 3 jobs, about 40.0 s left", "two first rounds are the half of two jobs"
    moment = 30.0
    outlook.ended(rows[0], 1, rows[:1])
    outlook.ended(rows[1], 0, rows[:2])
    assert screen.said == [
        "gguf-Q4_0  llamacpp      perplexity 9.488, KLD 0.2500, prompt 200.0 t/s, new 10.0 t/s, 300 MiB "
        "(1 of 3 jobs, about 30.0 s left)",
        "base       transformers  perplexity 9.488, prompt 200.0 t/s, new 10.0 t/s, 300 MiB "
        "(2 of 3 jobs, about 15.0 s left)",
    ]
    outlook.ended(rows[2], 0, rows)
    assert len(screen.said) == 2, "a failed one is told by who stores it"
    assert screen.whole == ""


def test_rows_of_an_axis_are_told_apart() -> None:
    screen = Screen()
    rows = [a_row("q", options={"kv_cache": kv, "threads": 2}) for kv in ("f16", "q8_0")]
    outlook = Outlook(rows, engine_texts(rows), screen)
    for row in rows:
        outlook.ended(row, 0, rows)
    assert [line.partition("  perplexity")[0] for line in screen.said] == [
        "q  llamacpp (kv_cache f16) ",
        "q  llamacpp (kv_cache q8_0)",
    ]


def test_a_run_tells_rows_of_an_axis_apart(bench: Bench) -> None:
    axis = {"llamacpp": {"variants": ["gguf-Q8_0"], "kv_cache": ["f16", "q8_0"]}}
    answer = bench("run", bench.recipe(backends=axis), "--format", "csv", WORKBENCH_PYTHON_LLAMACPP="/nowhere/python")
    assert answer.returncode == 1
    for kv in ("f16", "q8_0"):
        assert f"gguf-Q8_0 on llamacpp (kv_cache {kv}) failed: cannot start /nowhere/python" in answer.stderr


def test_an_interrupt_says_what_is_kept() -> None:
    screen = Screen()
    rows = [a_row(), a_row("gguf-Q4_0")]
    with pytest.raises(KeyboardInterrupt), Outlook(rows, engine_texts(rows), screen) as outlook:
        outlook.ended(rows[0], 1, rows[:1])
        raise KeyboardInterrupt
    assert screen.kept
    assert screen.said[-1] == "\n1 of 2 jobs measured and stored; what had begun begins again"


def test_on_a_terminal_a_table_grows() -> None:
    screen = Screen(live=True)
    rows = [a_row("gguf-Q4_0", windows=[(4, 8.4), (4, 10.4), (4, 9.4)]), a_row(), a_row("gguf-Q8_0", measured=False)]
    rows[2] = replace(rows[2], error="out of memory")
    came, frames = list[Row](), list[list[str]]()
    with Outlook(rows, engine_texts(rows), screen) as outlook:
        for row in rows:
            came.append(row)
            outlook.ended(row, 0, came)
            assert screen.table is not None
            frames.append([text.rstrip() for text, _ in screen.table(120, 20)])
    assert [len(frame) for frame in frames] == [5, 6, 7], "three lines of heading, a rule, a line a row"
    assert frames[0][2].split()[:2] == ["variant", "backend"]
    assert [line.split()[0] for line in frames[2][4:]] == ["base", "gguf-Q4_0", "gguf-Q8_0"], "the base first, whenever"
    assert "+0.998" not in frames[0][4] and "+0.998" in frames[1][5], "what it is to the base, once that is there"
    assert "failed" in frames[2][6]
    assert screen.said == [] and screen.kept is False


def test_every_beginning_of_stored_rows_is_a_table() -> None:
    """A run of hours must not end by what is only shown."""
    for file in REAL:
        stored, _ = store.read(file)
        for many in range(1, len(stored), 7):
            so_far(build(stored[:many]), stored[many - 1], 80, 24)
