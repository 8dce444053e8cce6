"""Sentences about rows: told once, also where only their numbers differ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rows import a_row, compared
from workbench.report.doubts import PREDICTED_FACTORS, ROUNDED_INPUTS_NATS, footnotes_of
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


LOW, HIGH = PREDICTED_FACTORS


def errs(predicted: float | None, measured: float, apart: float = 0.0) -> bool:
    """Whether the row of a file that was expected to diverge so far says that it does otherwise."""
    row = compared(a_row("chosen"), measured)
    choice = {"divergence": predicted} if predicted is not None else {}
    row = replace(row, artifact=replace(row.artifact, provenance={"choice": choice}))
    table = build([compared(a_row(), apart), row])
    chosen = next(line for line in table.lines if line.row.artifact.variant == "chosen")
    assert not any("prediction errs" in text for line in table.lines if line is not chosen for text in line.warnings)
    return any("prediction errs" in text for text in chosen.warnings)


@pytest.mark.parametrize("predicted", [0.03, 0.3])
def test_a_prediction_errs_where_more_or_less_was_measured_than_its_factors_allow(predicted: float) -> None:
    most = HIGH * predicted + ROUNDED_INPUTS_NATS
    assert not errs(predicted, predicted)
    assert (errs(predicted, 0.99 * most), errs(predicted, 1.01 * most)) == (False, True)
    assert (errs(predicted, 1.01 * LOW * predicted), errs(predicted, 0.99 * LOW * predicted)) == (False, True)


def test_a_prediction_is_not_blamed_for_the_engine() -> None:
    assert not errs(0.0005, 0.0005 + ROUNDED_INPUTS_NATS)
    more = 1.01 * (HIGH * 0.03 + ROUNDED_INPUTS_NATS)
    assert errs(0.03, more) and not errs(0.03, more, apart=0.01)


def test_what_was_not_predicted_is_not_judged() -> None:
    assert not errs(None, 3.0)
    chosen = compared(a_row("chosen"), 0.1234)
    chosen = replace(chosen, artifact=replace(chosen.artifact, provenance={"choice": {"divergence": 0.02}}))
    (said,) = build([compared(a_row(), 0.0), chosen]).footnotes
    assert "by 0.1234 nats a token, 6.2 times the 0.0200 predicted" in said
    # Of a row that was compared with another reference than its table's the divergence is not shown, and not judged.
    other = compared(replace(chosen, started_at="2020-01-01T00:00:00Z"), 0.1234, reference="r0")
    assert not any("prediction errs" in text for text in build([compared(a_row(), 0.0), other]).footnotes)


def test_ranges_of_sentences_that_have_one_themselves() -> None:
    told = [("took 2.3 to 3.6 ms",), ("took 2.1 to 3.4 ms",)]
    assert footnotes_of(told)[1] == ("took 2.1 to 3.6 ms",)
    assert footnotes_of(told[:1])[1] == told[0]
