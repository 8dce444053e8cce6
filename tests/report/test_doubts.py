"""Sentences about rows: told once, also where only their numbers differ."""

from __future__ import annotations

from tests.rows import a_row
from workbench.report.doubts import footnotes_of
from workbench.report.formats import FORMATS
from workbench.report.table import build


def carried(kind: str, error: str) -> str:
    return f"the checkpoint's own codes in blocks of {kind}; weights equal to {error} of the largest"


def test_sentences_that_differ_in_digits_are_one_with_the_range() -> None:
    rows = [
        a_row("a", warnings=[carried("Q4_1", "4.8e-04")]),
        a_row("b", warnings=[carried("Q4_1", "4.6e-04"), "busy"]),
        a_row("c", warnings=[carried("Q4_0", "4.6e-04")]),
        a_row("d", warnings=[carried("Q4_1", "1.2e-03")]),
    ]
    table = build([a_row(), *rows])
    assert table.footnotes == (carried("Q4_1", "4.6e-04 to 1.2e-03"), "busy", carried("Q4_0", "4.6e-04"))
    assert [line.footnotes for line in table.lines] == [(), (1,), (1, 2), (3,), (1,)]
    assert [line.warnings[0] for line in table.lines[1:3]] == [carried("Q4_1", e) for e in ("4.8e-04", "4.6e-04")]
    assert FORMATS["terminal"](table).count("codes in blocks of Q4_1") == 1


def test_what_is_no_number_of_a_sentence_keeps_two_apart() -> None:
    for one, other in (
        ("Q4_0 is lost", "Q4_1 is lost"),
        ("needs gguf 0.1.2", "needs gguf 0.1.3"),
        ("took 12 tokens", "took 12 layers"),
        ("float16 at load", "float32 at load"),
    ):
        assert footnotes_of([[one], [other]]) == ([(1,), (2,)], (one, other))
    marks, texts = footnotes_of([["1,000 of 4 left", "9 of 4 left"], [], ["-2 of 4 left"]])
    assert (marks, texts) == ([(1,), (), (2,)], ("9 to 1,000 of 4 left", "-2 of 4 left"))
    assert footnotes_of([]) == ([], ())
