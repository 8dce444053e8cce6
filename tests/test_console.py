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


def on_terminal(program: str, width: int) -> list[str]:
    """The lines that a program draws on a terminal of that width, without what steers it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env=own | {"TERM": "xterm", "PYTHONPATH": str(ROOT)},
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
