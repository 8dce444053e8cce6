"""What the person sees: a bar of one line at any width, and lines in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from tests.places import ROOT

STEP = """
from workbench.console import Console

show = Console()
show.whole = "3 of 19 jobs, about 12 min left"
with show.task("calibration pass: awq-4bit-g128, awq-4bit-g128-compensated, gptq-4bit-g128, importance matrix") as step:
    step(3, 10, "layer 3 of 30: mlp.down_proj")
with show.task("llamacpp: base, round 2", told=False) as step:
    step(1, 2, "timing")
"""

JOBS = """
import sys
from contextlib import suppress
from tests.rows import a_row
from workbench.console import Console
from workbench.profile.outlook import Outlook
from workbench.report.selection import engine_texts

show = Console()
rows = [a_row(f"q{number}") for number in range(9)] + [a_row()]
with suppress(KeyboardInterrupt), Outlook(rows, engine_texts(rows), show) as outlook:
    for number, row in enumerate(rows, 1):
        with show.task(f"job {number}", told=False) as step:
            step(1, 2, "timing")
        outlook.ended(row, 0, rows[:number])
        if number == int(sys.argv[1]):
            raise KeyboardInterrupt
"""


def on_terminal(program: str, width: int, *words: str, height: int = 24, **more: str) -> list[str]:
    """The lines that a program draws on a terminal of that size, without what steers it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env=own | {"TERM": "xterm", "PYTHONPATH": str(ROOT)} | more,
    )
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 65536):
            drawn += part
    except OSError:
        pass  # The last of its writers has gone.
    os.close(ours)
    assert child.wait() == 0
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode()))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_a_bar_has_its_times_at_any_width(width: int) -> None:
    lines = on_terminal(STEP, width)
    bars = [line.rstrip() for line in lines if "layer" in line]
    assert bars
    for line in bars:
        assert re.search(r"━{5}.* layer 3 .*\d:\d\d:\d\d left [\d-]:[\d-]{2}:[\d-]{2}$", line), line
        assert len(line) <= width
    assert any(line.strip() == "3 of 19 jobs, about 12 min left" for line in lines)
    said = [line for line in lines if line.endswith(" s")]
    assert len(said) == 1 and said[0].startswith("calibration pass: "), "what is not to be told is not"


def test_a_log_has_a_line_a_step() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", STEP],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )
    assert re.fullmatch(r"calibration pass: .*, importance matrix: \d+\.\d s\n", answer.stderr)


@pytest.mark.parametrize(("width", "height"), [(60, 24), (100, 24), (100, 12)])
def test_a_table_grows_above_the_bar(width: int, height: int) -> None:
    lines = [line.rstrip() for line in on_terminal(JOBS, width, "0", height=height)]
    frames, drawn = dict[int, list[str]](), list[str]()
    for line in lines:
        if found := re.match(r"  (\d+) of 10 jobs", line):
            frames[int(found[1])], drawn = drawn, []
        elif line and " left" not in line:  # the bar has its times
            drawn.append(line)
    assert [*frames] == [*range(10)] and frames[0] == [], "nothing was measured yet"
    for many, frame in frames.items():
        assert len(frame) <= height - 4 and all(len(line) <= width for line in frame)
        rows = [line.split()[0] for line in frame if line.startswith("q")]
        assert rows == [f"q{number}" for number in range(many)][-3 if height == 12 and many > 4 else 0 :]
        assert (frame[-1:] == [f"3 of {many} rows (all: `workbench table`)"]) == (height == 12 and many > 4)
    assert not any("perplexity" in line for line in lines), "no line of the log beside it"


def test_what_an_interrupt_ends_leaves_its_table() -> None:
    lines = [line.rstrip() for line in on_terminal(JOBS, 100, "2")]
    assert lines[-2:] == ["2 of 10 jobs measured and stored; what had begun begins again", ""]
    left = lines[max(place for place, line in enumerate(lines) if line.startswith("variant")) :]
    assert [line.split()[0] for line in left[2:4]] == ["q0", "q1"] and "9.488" in left[3]


def test_a_terminal_that_cannot_draw_gets_a_logs_lines() -> None:
    lines = on_terminal(JOBS, 100, "0", TERM="dumb")
    assert sum("perplexity" in line for line in lines) == 10 and not any("variant" in line for line in lines)
