"""Bytes of a stream, cut anywhere."""

from __future__ import annotations

import pytest

from workbench.serving.faults import Fault
from workbench.serving.stream import Event, Lines, Tally, event_of, is_end, parsed, shared_out, words_of

STREAM = (
    ': hello\r\n\r\ndata: {"model":"m","choices":[{"text":"grün"}]}\r\n\r\nevent: x\n'
    'data:{"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}],"new":[1]}\n\ndata: [DONE]\n\n'
).encode()


def test_lines_are_whole_wherever_they_are_cut() -> None:
    whole = Lines().feed(STREAM)
    for size in range(1, len(STREAM)):
        lines = Lines()
        parts = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
        assert [line for part in parts for line in lines.feed(part)] == whole
    events = [event for line in whole if (event := event_of(line))]
    assert [event.choices[0].says for event in events] == [True, True]
    assert [is_end(line) for line in whole if line].count(True) == 1


@pytest.mark.parametrize(
    "line",
    [b"data: {", b"data: 5", b'data: {"choices": 3}', b'data: {"choices":[{"text":"\xff"}]}', b"data: " + b"[" * 5000],
)
def test_what_is_no_event(line: bytes) -> None:
    with pytest.raises(Fault):
        event_of(line)


def test_an_error_in_place_of_an_event() -> None:
    with pytest.raises(Fault, match="no memory"):
        parsed(b'{"error": {"message": "no memory"}}')
    with pytest.raises(Fault, match="no stream"):
        event_of(b'{"error": "x"}')


def test_a_line_without_an_end_is_not_collected_for_ever() -> None:
    lines = Lines()
    with pytest.raises(Fault, match="a line of more than"):
        for _ in range(100):
            lines.feed(b"x" * 100_000)


def test_words_can_be_printed() -> None:
    assert words_of(b"a\x1b[31m\n\nb\xff" + b"x" * 999).startswith("a?[31m b")


def test_sums_are_shared_out_evenly() -> None:
    assert shared_out(7, 3) == [2, 2, 3] and shared_out(2, 3) == [0, 1, 1] and sum(shared_out(64, 9)) == 64


def test_an_answer_without_text_or_count_is_none() -> None:
    with pytest.raises(Fault, match="no text"):
        Tally().counted(4)
    tally = Tally()
    tally.take(Event(choices=[*parsed(b'{"choices":[{"text":"a","finish_reason":"stop"}]}').choices]), 1.0)
    with pytest.raises(Fault, match="neither ids nor usage"):
        tally.counted(4)
