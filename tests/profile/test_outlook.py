"""A run's progress: figures as they come, how many jobs are left, and what an interrupt leaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.rows import a_row, compared
from workbench.profile.outlook import Outlook
from workbench.report.selection import engine_texts


class Screen:
    """What is said, and what stands below the bar."""

    def __init__(self) -> None:
        self.whole, self.said = "", list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def task(self, text: str, told: bool = True) -> SimpleNamespace:
        raise NotImplementedError


def test_each_row_tells_its_figures_and_how_much_is_left() -> None:
    screen, moment = Screen(), 0.0
    rows = [compared(a_row("gguf-Q4_0"), 0.25), a_row("base", "transformers"), a_row("base", "vllm", measured=False)]
    outlook = Outlook(rows, engine_texts(rows), screen, lambda: moment)
    assert screen.whole == "0 of 3 jobs"
    moment = 20.0
    outlook.waiting(2)
    assert screen.whole == "0 of 3 jobs, about 40.0 s left", "two first rounds are the half of two jobs"
    moment = 30.0
    outlook.ended(rows[0], 1)
    outlook.ended(rows[1], 0)
    assert screen.said == [
        "gguf-Q4_0  llamacpp      perplexity 9.488, KLD 0.2500, prompt 200.0 t/s, new 10.0 t/s, 300 MiB "
        "(1 of 3 jobs, about 30.0 s left)",
        "base       transformers  perplexity 9.488, prompt 200.0 t/s, new 10.0 t/s, 300 MiB "
        "(2 of 3 jobs, about 15.0 s left)",
    ]
    outlook.ended(rows[2], 0)
    assert len(screen.said) == 2, "a failed one is told by who stores it"
    assert screen.whole == ""


def test_rows_of_an_axis_are_told_apart() -> None:
    screen = Screen()
    rows = [a_row("q", options={"kv_cache": kv, "threads": 2}) for kv in ("f16", "q8_0")]
    outlook = Outlook(rows, engine_texts(rows), screen)
    for row in rows:
        outlook.ended(row, 0)
    assert [line.partition("  perplexity")[0] for line in screen.said] == [
        "q  llamacpp (kv_cache f16) ",
        "q  llamacpp (kv_cache q8_0)",
    ]


def test_an_interrupt_says_what_is_kept() -> None:
    screen = Screen()
    rows = [a_row(), a_row("gguf-Q4_0")]
    with pytest.raises(KeyboardInterrupt), Outlook(rows, engine_texts(rows), screen) as outlook:
        outlook.ended(a_row(), 1)
        raise KeyboardInterrupt
    assert screen.said[-1] == "\n1 of 2 jobs measured and stored; what had begun begins again"
