"""The advice as a stranger reads it, and that no wish makes it wrong: over the published rows, and over busy ones."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.command import command
from tests.places import ROOT
from tests.rows import REAL, a_row, compared
from workbench.errors import UserError
from workbench.records import Row, Served, Speed, Task, Workload
from workbench.report import store
from workbench.report.table import build
from workbench.report.verdicts.recommend import Constraints, Recommendation, objects, parse_named, recommend

MIB = 2**20


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("advice", ROOT / "benchmarks" / "advice.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.parent.name[-6:])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_no_wish_gets_an_undecided_choice_while_another_holds(script: ModuleType, file: Path, seed: int | None) -> None:
    rows, _ = store.read(file)
    table = build(rows if seed is None else script.busy(rows, seed))
    standings = []
    for wish in script.wishes(table, seed or 0, 70):
        found = recommend(table, wish)
        assert script.faults(found) == []
        assert max(map(len, str(found).splitlines())) <= 80 or "/" in str(found)
        if found.choice is None:
            continue
        standings.append(found.choice.standing)
        least, rate = wish.min_decode_tok_s, found.choice.decode
        surer = [one.decode.interval for one in found.fitting if one.decode and one.decode.interval and not one.doubts]
        if least and rate and rate.interval and rate.interval[0] < least:
            assert not [ends for ends in surer if ends[0] >= least]
    assert {0, 1} <= {*standings}, "or the wishes show nothing"


def test_the_published_rows_give_what_their_figures_say(script: ModuleType) -> None:
    rows, _ = store.read(REAL[0])
    table = build(rows)
    found = recommend(table, Constraints(size_bytes=160 * MIB, sort="quality", backend="vllm"))
    assert found.choice is not None and found.choice.name == "gguf-Q6_K on vllm"
    awq = recommend(build([row for row in rows if "gguf" not in row.artifact.variant]), found.constraints)
    assert awq.choice is not None and awq.choice.name == "awq-4bit-g128-compensated on vllm" and awq.tied == ()


@pytest.mark.slow
def test_the_script_finds_nothing_wrong(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(str(REAL[0]), 3) == 0
    told = capsys.readouterr()
    assert told.out.count("| busy |") == len(script.WISHES) and not told.err


def made(variant: str, tok_s: float, mib: int = 300, disk_mib: int = 200, nats: float = 0.0, **more: Any) -> Row:
    row = a_row(
        variant,
        windows=[(400, total + nats) for total in (900.0, 960.0, 880.0, 930.0)],
        step_s=[[1 / rate] * 2 for rate in (tok_s * 0.998, tok_s, tok_s * 1.002)],
        memory={"peak_rss": mib * MIB},
        **more,
    )
    return replace(row, artifact=replace(row.artifact, disk_bytes=disk_mib * MIB))


def ask(rows: list[Row], **limits: Any) -> Recommendation:
    more = " ".join(["--x 1"] * 12)
    return recommend(build(rows), Constraints(**limits), lambda row: f"serve --model {row.artifact.path} {more}")


def test_it_says_the_wish_the_choice_the_runner_up_why_and_how_to_serve() -> None:
    rows = [
        compared(made("base", 50), 0.0),
        compared(made("q", 90, 150, 100, 4.0, warnings=["the machine was busy"]), 0.04),
        compared(made("r", 70, 120, 80, 8.0), 0.08),
        made("awq", 1, measured=False, error="x" * 400),
    ]
    found = ask(rows, memory_bytes=200 * MIB)
    assert str(found).splitlines() == [
        "Wish: the fastest, at most 200 MiB of memory",
        "",
        "Choice: q on llamacpp",
        "  weights     gguf",
        "  speed       90.0 tok/s (89.6 to 90.4), tg3 @ d100",
        "  prompts     200.0 tok/s (76.5 to 443.7), pp100",
        "  divergence  0.0400 nat (0.0400 to 0.0400)",
        "  perplexity  10.012 (+1.01%)",
        "  memory      150 MiB, 100 MiB on disk",
        "  note        the machine was busy",
        "",
        "Runner-up: r on llamacpp",
        "  weights     gguf",
        "  speed       70.0 tok/s (69.7 to 70.3), tg3 @ d100",
        "  prompts     200.0 tok/s (76.5 to 443.7), pp100",
        "  divergence  0.0800 nat (0.0800 to 0.0800)",
        "  perplexity  10.112 (+2.02%)",
        "  memory      120 MiB, 80 MiB on disk",
        "  second as   it is slower, or its speed is less sure",
        "",
        "Its speed was measured under bad conditions (see its note). Measure again:",
        "  workbench run RECIPE --again -v q -b llamacpp",
        "",
        "Serve it with (room for 103 tokens a sequence, as measured):",
        "  serve --model q.gguf --x 1 --x 1 --x 1 --x 1 --x 1 --x 1 --x 1 --x 1 --x 1 \\",
        "    --x 1 --x 1 --x 1",
        "",
        "Rejected:",
        "  base on llamacpp: memory 300 MiB, at most 200 MiB",
        "  awq on llamacpp: failed:",
        f"    {'x' * 292}",
    ]
    record = objects(found)
    assert record["why"] == "speed" and record["hope"] is None and record["runner_up"]["name"] == "r on llamacpp"  # type: ignore[index]
    assert record["choice"]["doubts"] == [] and record["choice"]["notes"] == ["the machine was busy"]  # type: ignore[index]
    nothing = str(ask(rows[:1], memory_bytes=1))
    assert "Nothing fits. What each fails on:\n  base on llamacpp: memory 300 MiB, at most 0 MiB" in nothing


def wide(variant: str, deep: float, many: float, served: float | None = None, right: int = 5) -> Row:
    """A row of two lengths, two batches, requests and a task of ten items."""
    row = made(variant, 100)
    assert row.measurement is not None

    def speed(length: int, batch: int, rate: float) -> Speed:
        steps = [[batch / each] * 2 for each in (rate * 0.99, rate, rate * 1.01)]
        return Speed(length, 3, batch, [1.0, 1.01, 0.99], steps, [[batch] * 2] * 3)

    speeds = [*row.measurement.speeds, speed(4000, 1, deep), speed(100, 8, many)]
    tokens = [Served(8, 100, [10, 10], [20 / served * factor for factor in (0.99, 1, 1.01)], True)] if served else []
    answers: Any = {"sums": {"correct": [1] * right + [0] * (10 - right)}}
    return replace(
        row,
        workload=Workload([100, 4000], 3, [1, 8], requests=2),
        tasks={"sums": Task("sums", "t", "t1", 10, 20)},
        measurement=replace(row.measurement, speeds=speeds, served=tokens, tasks=answers),
    )


def test_speeds_are_those_of_the_batch_and_the_context_that_were_asked_for() -> None:
    rows = [wide("base", 50, 300, 200), wide("p", 30, 500, 400), replace(made("q", 100), key="other")]
    deep, many = ask(rows, context=4003), ask(rows, batch=8)
    assert deep.choice and deep.choice.name.startswith("base on") and deep.choice.decode
    assert deep.choice.decode.name == "tg3 @ d4000" and deep.choice.decode.median == pytest.approx(50)
    assert many.choice and many.choice.name.startswith("p on") and many.choice.decode
    assert many.choice.decode.name == "tg3 @ d100 b8" and many.choice.decode.median == pytest.approx(500)
    why = next(reasons for name, reasons in many.rejected.items() if name.startswith("q"))
    assert why == (
        "speed was not measured at any tokens x 8, only with prompts of 100 tokens x 1: see the recipe's `workload:`",
    )
    assert not ask(rows, context=4004).fitting and not ask(rows, context=4000, batch=8).fitting
    served = ask(rows, min_served_tok_s=300)
    assert served.choice and served.choice.name.startswith("p on") and len(served.rejected) == 2
    assert "served      400.0 tok/s (3" in str(served)


def test_accuracy_and_further_sets_are_limits_too() -> None:
    rows = [wide("base", 1, 1, right=10), wide("p", 2, 2, right=5), wide("q", 3, 3, right=0)]
    found = ask(rows, min_accuracy=0.6)
    assert [one.name.split()[0] for one in found.fitting if one.standing == 0] == ["base"]
    assert found.choice and found.choice.name.startswith("base")  # 72 % at the least; 5 of 10 are 24 to 76 %
    (undecided,) = [one for one in found.fitting if one.doubts]
    assert undecided.standing == 2 and undecided.doubts[0].cure == "items"
    assert undecided.doubts[0].words == "accuracy on sums 50.0% (23.7% to 76.3%), at least 60.0%"
    (rejected,) = found.rejected.values()
    assert rejected == ("accuracy on sums 0.0% (0.0% to 27.8%), at least 60.0%",), "0 of 10 may be 28 of 100"
    assert ask([made("base", 1)], min_accuracy=0.1).rejected == {
        "base on llamacpp": ("accuracy on tasks was not measured",)
    }
    for limits, words in (({"max_kld": {"cod": 1.0}}, "set 'cod'"), ({"min_accuracy": {"sum": 0.5}}, "task 'sum'")):
        with pytest.raises(UserError, match=words):
            ask(rows, **limits)


def test_limits_by_name_on_the_command_line() -> None:
    assert parse_named(["0.1", "code:2e-3", "my set:5%"], "--max-kld") == {"": 0.1, "code": 0.002, "my set": 0.05}
    for wrong in ("-0.1", "code:", "nan", "code=1"):
        with pytest.raises(UserError, match=r"--max-kld .*a limit is zero or more, as 0.1, or NAME:0.1"):
            parse_named([wrong], "--max-kld")
    words = ("recommend", str(REAL[0]), "--max-kld", "0.1", "--batch", "1", "--context", "500", "--min-accuracy", "60%")
    done = command(*words)
    assert done.returncode == 1 and "accuracy on tasks was not measured" in done.stdout
    done = command(*words[:-2])
    assert done.returncode == 0 and "divergence at most 0.1 nat, batch 1" in " ".join(done.stdout.split())
