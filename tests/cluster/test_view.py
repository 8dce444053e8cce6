"""What is shown of two hundred steps on twenty machines."""

from __future__ import annotations

from workbench.cluster.node import Told
from workbench.cluster.schedule import Place, Schedule, Step
from workbench.cluster.view import View, summary


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def begun() -> tuple[Schedule, View, Told, Clock]:
    clock, show = Clock(), Told()
    schedule = Schedule([Step(f"job {number}", cost=200.0 - number) for number in range(200)])
    schedule.join([Place(f"id{number}", "desk", name=f"desk-{number:02}") for number in range(20)])
    view = View(schedule, show, clock)
    started = [step.name for step, _ in schedule.begin()]
    view.tell()
    clock.now = 120.0
    for name in started[:10]:
        schedule.ended(name)
    return schedule, view, show, clock


def test_a_log_gets_a_line_a_minute() -> None:
    schedule, view, show, clock = begun()
    told = "10 of 200 steps, 10 running on 10 of 20 machines, about 38 min 0 s left"
    view.tell()
    assert show.lines == [told]
    clock.now += 30.0
    view.tell()
    assert show.lines == [told]
    clock.now += 30.0
    schedule.failed("job 11", "killed")
    schedule.give_up("job 12", "killed")
    view.tell()
    assert len(show.lines) == 2 and "1 failed" in show.lines[1]


def test_a_terminal_shows_what_runs_where() -> None:
    _, view, show, clock = begun()
    show.live = True
    view.tell()
    assert show.whole.startswith("10 of 200 steps")
    lines = view.lines(80, 24)
    assert len(lines) == 20 and all(len(line) <= 80 for line, _ in lines)
    assert sum("idle" in line for line, _ in lines) == 10 and "job 1" in lines[0][0]
    # In a low terminal those at work, and how many more there are.
    low = view.lines(80, 5)
    assert len(low) == 5 and low[-1][0] == "and 16 more machines" and "idle" not in low[0][0]


def test_the_summary_counts() -> None:
    schedule, _, _, _ = begun()
    assert summary(schedule, 7, 21, {"h100": 2, "l40s": 1}) == "200 steps, 7 variants, 21 rows on 2 x h100, l40s"
