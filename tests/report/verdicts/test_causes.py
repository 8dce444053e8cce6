"""Twenty-two regressions of one cause are one thing that is told, with what changed on its first line."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

from tests.rows import a_row
from workbench.records import Row
from workbench.report.site.templates import fill
from workbench.report.verdicts.causes import differing, grouped, known_versions, spoken
from workbench.report.verdicts.compare import compare, json_text
from workbench.report.verdicts.compare import text as compared_text
from workbench.report.verdicts.night import judge
from workbench.report.verdicts.night import text as night_text
from workbench.report.verdicts.steps import by_cause, series_of, steps_of

VARIANTS = ("base", *(f"gguf-Q{bits}_K" for bits in range(2, 12)))


def a_night(day: int, slow: bool = False, machine: str = "desk") -> list[Row]:
    """Two engines' rows in any order; where it is slow, llamacpp came in another version and takes more memory too."""
    engine = {"llama-cpp-python": "0.3.37" if slow else "0.3.36", "commit": "bbbb" if slow else "aaaa"}
    rows = [
        a_row(
            variant,
            backend,
            machine=machine,
            step_s=[[0.12 if slow and backend == "llamacpp" else 0.1] * 2] * 3,
            memory={"peak_rss": (330 if slow and backend == "llamacpp" else 300) * 2**20},
            versions=engine if backend == "llamacpp" else {"vllm": "1"},
            started_at=f"2026-11-{day:02}T02:00:00Z",
        )
        for variant in VARIANTS
        for backend in ("vllm", "llamacpp")
    ]
    return random.Random(day).sample(rows, len(rows))


CAUSE = "changed with it: llama-cpp-python 0.3.36 -> 0.3.37, commit aaaa -> bbbb"


def test_a_nights_regressions_are_told_by_engine_under_what_changed() -> None:
    before = [row for day in range(1, 8) for row in a_night(day)]
    lines = night_text(judge(before, a_night(8, slow=True) * 3), "toy", "desk").splitlines()
    assert lines[2] == f"llamacpp, 22 alarms; {CAUSE}" and len(lines) == 4 + 22
    told = [re.search(r"(decode_tok_s|peak_rss_bytes)", line)[1] for line in lines[4:]]  # type: ignore[index]
    assert told == ["decode_tok_s"] * 11 + ["peak_rss_bytes"] * 11


def test_a_comparison_says_what_changed_above_the_pairs_of_an_engine() -> None:
    lines = compared_text(compare(a_night(1), a_night(2, slow=True))).splitlines()
    assert lines[1] == f"llamacpp, {CAUSE}:"
    assert len([line for line in lines if line.endswith(" on llamacpp")]) == 11
    assert not any("vllm" in line for line in lines), "nothing moved there"
    told = json.loads(json_text(compare(a_night(1), a_night(2, slow=True))))
    changed = {each["backend"]: each["changed"] for each in told}
    assert changed == {"vllm": {}, "llamacpp": {"llama-cpp-python": ["0.3.36", "0.3.37"], "commit": ["aaaa", "bbbb"]}}


def test_steps_of_one_night_machine_and_engine_are_one() -> None:
    rows = [row for day in range(1, 13) for row in a_night(day, day > 6) + a_night(day, day > 8, "lab")]
    steps = [step for one in series_of(rows) for step in steps_of(one)]
    groups = by_cause(steps)
    assert [(g[0].first.at[:10], g[0].series.machine, len(g)) for g in groups] == [
        ("2026-11-09", "lab", 22),
        ("2026-11-07", "desk", 22),
    ]
    assert [step.metric for step in groups[0]] == ["decode_tok_s"] * 11 + ["peak_rss_bytes"] * 11
    assert spoken(step.changed for step in groups[0]) == CAUSE
    page = fill("index.html", title="t", pages=[], steps=steps)
    assert page.count("llama-cpp-python 0.3.36") == 2 and page.count("<b>gguf-Q2_K on llamacpp</b>") == 4


def test_what_a_row_ran_with_is_versions_driver_and_system() -> None:
    row = replace(a_row(versions={"torch": "2"}), machine=replace(a_row().machine, driver="580", system="Linux 6"))
    assert known_versions(row) == {"torch": "2", "driver": "580", "system": "Linux 6"}
    assert differing(known_versions(row), {"torch": "2", "system": "Linux 7"}) == {
        "driver": ("580", ""),
        "system": ("Linux 6", "Linux 7"),
    }
    assert spoken([{}, {"driver": ("580", "")}]) == "changed with it: driver 580 -> ?"
    assert spoken([]) == "no version changed with it"
    assert grouped([1, 2, 3, 4], lambda number: number % 2) == [[1, 3], [2, 4]]
