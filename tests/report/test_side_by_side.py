"""What a table puts together and what it keeps apart: workloads, options, bases, sets, tasks, engines."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from tests.rows import a_row, compared
from workbench.records import Evaluation, Row, Task, Workload
from workbench.report.doubts import quality_missing
from workbench.report.metrics import METRICS
from workbench.report.noise import ANOTHER_MODEL_NATS
from workbench.report.selection import in_order, labels_of, latest_of_each_pair, pair_of
from workbench.report.table import Table, build, shared_settings, workload


def on(row: Row, **changed: Any) -> Row:
    """The row with its measurement changed."""
    assert row.measurement is not None
    return replace(row, measurement=replace(row.measurement, **changed))


def varying(*rows: Row) -> dict[str, list[str]]:
    table = build(list(rows))
    return {column.name: [column.text(line.row) for line in table.lines] for column in table.varying}


def test_what_pages_and_tables_show_of_a_metric() -> None:
    mib = 2.0**20
    shown = {
        n: (m.column.unit, m.column.spec, m.column.scale, m.column.printed) for n, m in METRICS.items() if m.column
    }
    assert shown == {
        "bits_per_weight": ("bit", ".2f", 1, "always"),
        "disk_bytes": ("MiB", ".1f", mib, "always"),
        "load_s": ("s", ".1f", 1, "always"),
        "peak_rss_bytes": ("MiB", ".0f", mib, "always"),
        "peak_vram_bytes": ("MiB", ".0f", mib, "where measured"),
        "prefill_tok_s": ("tok/s", ".1f", 1, "always"),
        "decode_tok_s": ("tok/s", ".1f", 1, "always"),
        "ttft_s": ("ms", ".1f", 1e-3, "never"),
        "itl_p95_s": ("ms", ".1f", 1e-3, "never"),
        "goodput_req_s": ("req/s", ".2f", 1, "where measured"),
        "largest_rate_req_s": ("req/s", ".2f", 1, "where measured"),
        "energy_j_per_token": ("J/token", ".3f", 1, "never"),
        "bandwidth_fraction": ("%", ".0f", 0.01, "never"),
        "perplexity": ("", ".3f", 1, "never"),
        "kld_mean": ("nat", ".4f", 1, "never"),
        "kld_predicted": ("nat", ".4f", 1, "where measured"),
        "kld_p99": ("nat", ".3f", 1, "never"),
        "top1_agreement": ("%", ".2f", 0.01, "never"),
    }
    assert [name for name, metric in METRICS.items() if metric.scored_on == "text"] == ["perplexity", "bits_per_byte"]


def test_rows_of_different_workloads_are_told_apart() -> None:
    one = a_row(workload=Workload(prompt_tokens=[100], new_tokens=3, batches=[1]))
    other = on(one, speeds=[replace(one.measurement.speeds[0], prompt_tokens=200, new_tokens=4, batch=2)])  # type: ignore[union-attr]
    other = replace(other, workload=Workload(prompt_tokens=[200], new_tokens=4, batches=[2]))
    assert varying(one, other) == {"workload": ["pp100 tg3 b1", "pp200 tg4 b2"]}
    longer = replace(one, workload=Workload(prompt_tokens=[100, 7], new_tokens=3, batches=[1]))
    assert varying(one, longer) == {"prompt_tokens": ["100", "[100, 7]"]}
    assert varying(one, replace(longer, backend="vllm")) == {}, "no two lines that need it"
    # What was measured is told, and where nothing was, what was asked for: its first point.
    assert workload(other) == (200, 4, 2)
    asked = Workload(prompt_tokens=[300, 5], new_tokens=6, batches=[7, 8])
    assert workload(replace(one, measurement=None, workload=asked)) == (300, 6, 7)


def test_a_delta_is_to_the_base_of_the_same_options_then_of_the_same_workload() -> None:
    short, long = (Workload(prompt_tokens=[n], new_tokens=3, batches=[1]) for n in (100, 200))

    def row(variant: str, nats: float, threads: int, load: Workload) -> Row:
        return a_row(variant, windows=[(4, nats)] * 2, options={"threads": threads}, workload=load)

    bases = [
        row("base", 8.0, 1, short),
        row("base", 8.1, 2, long),
        row("base", 8.2, 2, short),
        row("base", 8.3, 1, long),
    ]

    def delta(threads: int, load: Workload, among: list[Row] = bases) -> float:
        lines = build([*among, row("q", 9.0, threads, load)]).lines
        (found,) = (line for line in lines if line.row.artifact.variant == "q")
        assert found.delta is not None
        return found.delta.value

    def against(nats: float) -> Any:
        return pytest.approx(math.exp(9 / 4) - math.exp(nats / 4))

    assert delta(1, short) == against(8.0) and delta(2, long) == against(8.1)
    assert delta(2, short) == against(8.2) and delta(1, long) == against(8.3)
    assert delta(2, short, bases[:2]) == against(8.1), "options change a number of quality, a workload does not"
    assert delta(3, long, bases[:2]) == against(8.1)
    elsewhere = a_row("base", "vllm", windows=[(4, 7.0)] * 2)
    foreign = a_row("base", base="Other-2M", windows=[(4, 7.0)] * 2)
    assert delta(1, short, [elsewhere, foreign, bases[0]]) == against(8.0)


def test_devices_and_bases_are_columns_where_they_differ() -> None:
    gpu = on(a_row("q"), device="NVIDIA H100")
    assert varying(a_row(), gpu) == {"device": ["cpu", "NVIDIA H100"]}
    # A row that never ran has no device, which is no other device.
    assert varying(a_row(), a_row("q", measured=False, error="no")) == {}
    options = [a_row(options={"kv": kv, "threads": 2}) for kv in ("f16", None)]
    assert varying(*options) == {"kv": ["f16", ""]}
    assert varying(options[0], a_row("q", options={"kv": "q8"}), a_row(backend="vllm", options={"kv": "q4"})) == {}


def test_what_all_lines_of_an_engine_ran_with() -> None:
    rows = [
        on(a_row(), settings={"threads": 2, "kv": "f16"}),
        on(a_row("q"), settings={"threads": 2, "kv": "q8", "more": 1}),
        a_row("r", measured=False, error="no"),
        on(a_row(backend="vllm"), settings={"dtype": "bf16"}),
    ]
    assert shared_settings(build(rows)) == {"llamacpp": {"threads": 2}, "vllm": {"dtype": "bf16"}}


def test_why_there_is_no_quality() -> None:
    unscored = a_row(evaluation=None)
    assert quality_missing(unscored) == "no quality: the recipe has no evaluation"
    assert quality_missing(a_row()) is quality_missing(replace(unscored, measurement=None)) is None
    assert quality_missing(on(a_row(), qualities={})) is None, (
        "it was to be scored and was not: that is an error's case"
    )
    for source, said in (({"config": "c"}, "random weights"), ({"hub": "h"}, "no evaluation")):
        drawn = replace(unscored, artifact=replace(unscored.artifact, provenance={"source": source}))
        assert said in (quality_missing(drawn) or "")


def a_set(name: str, nats: float, digest: str, row: Row) -> Row:
    """The row scored on one more set."""
    assert row.measurement is not None
    windows = [{"count": 4, "nonfinite": 0, "nll_sum": nats}] * 2
    return replace(
        on(row, qualities=row.measurement.qualities | {name: {"windows": windows}}),
        evaluations=row.evaluations | {name: Evaluation(name, f"{name}.json", digest, 8, "second-half", 2, 8)},
    )


def test_every_set_has_numbers_of_its_own() -> None:
    rows = [
        a_set("code", 4.0, "c1", a_row()),
        a_set("code", 6.0, "c1", a_row("q")),
        a_set("code", 7.0, "c2", a_row("r")),
    ]
    table = build([*rows, a_row("s")])
    assert list(table.sets) == ["prose", "code"] and table.first is table.sets["prose"]
    code = table.sets["code"]
    assert code.evaluation is not None and code.evaluation.digest == "c1"
    assert [line.values["perplexity"] for line in code.lines] == [
        pytest.approx(math.exp(1.0)),
        pytest.approx(math.exp(1.5)),
        None,
        None,
    ]
    assert code.lines[1].delta is not None and code.lines[1].delta.value == pytest.approx(math.exp(1.5) - math.exp(1))
    assert [line.values["perplexity"] for line in table.lines] == [pytest.approx(math.exp(27 / 12))] * 4
    assert list(build([a_row(evaluation=None)]).sets) == [""]


def test_tasks_have_scores_with_deltas_by_item() -> None:
    def answering(variant: str, correct: list[int], digest: str = "t1", **more: Any) -> Row:
        row = on(a_row(variant, **more), tasks={"quiz": {"correct": correct, "given": [], "warnings": []}})
        return replace(row, tasks={"quiz": Task("quiz", "quiz.json", digest, len(correct), 9)})

    right = [1, 1, 1, 1, 0, 1, 1, 1]
    wrong = [0, 0, 0, 1, 0, 0, 0, 1]
    table = build([answering("base", right), answering("q", wrong), answering("r", right, "t2"), a_row("s")])
    base, q, r, s = (line.tasks.get("quiz") for line in table.lines)
    assert base and q and (r, s) == (None, None)
    assert (base.accuracy.value, q.accuracy.value) == (7 / 8, 2 / 8)
    assert base.accuracy.se == pytest.approx(math.sqrt(7 / 8 * 1 / 8 / 7))
    assert base.delta is not None and (base.delta.value, base.delta.se, base.below_noise_floor) == (0.0, 0.0, True)
    # Five of eight items lost: -0.625 with an error of sqrt(8 / 7 * (5 * 0.375^2 + 3 * 0.625^2)) / 8.
    assert q.delta is not None and q.delta.value == -5 / 8
    assert q.delta.se == pytest.approx(math.sqrt(8 / 7 * (5 * 0.375**2 + 3 * 0.625**2)) / 8)
    assert q.below_noise_floor is False
    close = build([answering("base", right), answering("q", [0, *right[1:]])]).lines[1].tasks["quiz"]
    assert close.below_noise_floor is True
    one = build([answering("base", [1]), answering("q", [0])]).lines[1].tasks["quiz"]
    assert one.delta is not None and one.delta.se is None and one.below_noise_floor is True
    alone = build([answering("q", right)]).lines[0].tasks["quiz"]
    assert alone.delta is None and alone.below_noise_floor is None
    assert build([answering("base", right, backend="vllm"), answering("q", right)]).lines[1].tasks["quiz"].delta is None
    quiz, said = answering("base", right).tasks["quiz"], {"correct": right, "given": [], "warnings": []}
    two = replace(on(a_row(), tasks={"quiz": said, "later": said}), tasks={"quiz": quiz, "later": quiz})
    changed = replace(
        two, artifact=replace(two.artifact, variant="q"), tasks={"quiz": replace(quiz, digest="t2"), "later": quiz}
    )
    assert build([two, changed]).lines[1].tasks.keys() == {"later"}, "one with other items hides no other"


def floors(table: Table) -> list[tuple[str, tuple[str, ...], float]]:
    return [(floor.base, floor.backends, floor.spread) for floor in table.first.noise_floors]


def test_noise_floors_are_of_each_base_over_two_engines_or_more() -> None:
    rows = [
        a_row("base", "vllm", windows=[(4, 8.0)]),
        a_row("base", "llamacpp", windows=[(4, 8.4)]),
        a_row("base", "llamacpp", windows=[(4, 8.2)], options={"threads": 2}),
        a_row("q", "vllm", windows=[(4, 12.0)]),
        a_row("base", "vllm", windows=[(4, 9.0)], base="Other-2M"),
    ]
    table = build(rows)
    assert floors(table) == [("Toy-1M", ("llamacpp", "vllm"), pytest.approx(math.exp(2.1) - math.exp(2)))] or floors(
        table
    ) == [("Toy-1M", ("vllm", "llamacpp"), pytest.approx(math.exp(2.1) - math.exp(2)))]
    assert table.first.noise_floors[0].relative == pytest.approx(math.expm1(0.1))
    assert table.notes == ("noise floor unknown: Other-2M itself was not scored on two backends",)
    # A floor is of its own base: the other's delta is as far from nothing as it says.
    more = [a_row("r", "vllm", windows=[(400, 900.0)] * 4, base="Other-2M")]
    base = [a_row("base", "vllm", windows=[(400, 899.0), (400, 899.01)] * 2, base="Other-2M")]
    (line,) = (line for line in build([*rows[:4], *base, *more]).lines if line.row.artifact.variant == "r")
    assert line.below_noise_floor is None


def test_a_base_that_is_another_model_on_an_engine() -> None:
    assert ANOTHER_MODEL_NATS == 0.02
    for kld, told in ((0.0199, 0), (0.0201, 1)):
        lines = build([compared(a_row(), kld), compared(a_row("q"), 0.5)]).lines
        assert [sum("runs the base as another model" in text for text in line.warnings) for line in lines] == [told] * 2
    assert build([a_row(), compared(a_row("q"), 0.5)]).lines[1].warnings == ()


def test_warnings_are_told_once_and_of_all_that_has_them() -> None:
    row = replace(on(a_row(), warnings=["measured", "twice"]), warnings=["row", "twice", ""])
    row = replace(row, artifact=replace(row.artifact, warnings=("made",)))
    (line,) = build([row]).lines
    assert line.warnings == ("made", "measured", "twice", "row") and line.footnotes == (1, 2, 3, 4)
    assert build([row]).footnotes == line.warnings


def test_of_two_rows_of_one_moment_the_later_in_the_file_is_the_latest() -> None:
    notes: list[str] = []
    (kept,) = latest_of_each_pair([a_row(key="1"), a_row(key="2")], notes)
    assert kept.key == "2" and len(notes) == 1
    (kept,) = latest_of_each_pair([a_row(key="1", measured=False, error="no"), a_row(key="2")], notes)
    assert kept.key == "2"
    late = a_row(key="3", measured=False, error="no", started_at="2026-11-22T00:00:00Z")
    never = a_row(key="0", measured=False, error="no")
    assert [row.key for row in latest_of_each_pair([never, late], [])] == ["3"]
    cannot = replace(late, error=None, unsupported="no such type")
    assert [row.key for row in latest_of_each_pair([a_row(key="1"), cannot], [])] == ["3"]
    counted: list[str] = []
    latest_of_each_pair([a_row(), a_row(), a_row(), a_row("q")], counted)
    assert counted == ["2 rows not shown: superseded by a later one of the same variant and backend"]
    latest_of_each_pair([a_row(), a_row("q")], counted)
    assert len(counted) == 1


def test_rows_stand_as_their_recipe_has_them() -> None:
    rows = [
        a_row("q4", "vllm", place=5),
        a_row("q4", "llamacpp", place=4),
        a_row("base", "vllm", place=3),
        a_row("q8", "llamacpp", place=2),
        a_row("base", "llamacpp", place=1),
        a_row("x", recipe="later", base="Other-2M", place=0),
    ]
    assert [(row.artifact.variant, row.backend) for row in in_order(rows)] == [
        ("base", "llamacpp"),
        ("base", "vllm"),
        ("q8", "llamacpp"),
        ("q4", "llamacpp"),
        ("q4", "vllm"),
        ("x", "llamacpp"),
    ]
    assert [row.recipe for row in in_order(rows[::-1])] == ["later"] + ["toy"] * 5


def test_labels_say_what_differs_within_a_variant_and_engine_alone() -> None:
    rows = [
        a_row(options={"kv": "f16", "threads": 2}),
        a_row(options={"kv": "q8", "threads": 2}),
        a_row(options={"threads": 2}),
        a_row("q", options={"kv": "q4"}),
        a_row(backend="vllm", options={"kv": "x"}),
        a_row(base="Other-2M", options={"kv": "y"}),
    ]
    labels = labels_of({pair_of(row): row for row in rows})
    assert list(labels.values()) == [
        "base on llamacpp (kv f16)",
        "base on llamacpp (kv q8)",
        "base on llamacpp",
        "q on llamacpp",
        "base on vllm",
        "base on llamacpp",
    ]
    loads = [Workload(prompt_tokens=[8], batches=[1]), Workload(prompt_tokens=[8], batches=[2, 4])]
    told = labels_of({pair_of(row): row for row in (a_row(workload=load) for load in loads)})
    assert list(told.values()) == ["base on llamacpp (batch 1)", "base on llamacpp (batch [2, 4])"]


def test_an_engine_that_runs_another_model_is_no_noise() -> None:
    """Else all that is nearer to the base than that engine would be called the base, and quality would decide
    nothing."""
    scored = {each: [(400, 400 * nats), (400, 401 * nats)] for each, nats in (("own", 2.6), ("other", 3.2), ("q", 3.1))}
    rows = [
        compared(a_row("base", "transformers", windows=scored["own"]), 0.0),
        compared(a_row("base", "llamacpp", windows=[(400, 1040.1), (400, 1042.8)]), 0.0001),
        compared(a_row("Q2_K", "llamacpp", windows=scored["q"]), 0.5),
    ]
    broken = compared(a_row("base", "vllm", windows=scored["other"]), 0.6)
    assert floors(build([*rows, broken])) == floors(build(rows)) != []
    assert build([*rows, broken]).lines[-1].below_noise_floor is False
    # Of one engine that is left nothing is known of the noise.
    assert floors(build([rows[0], broken])) == []


def test_rows_that_only_a_workload_tells_apart_are_told_apart() -> None:
    """As where a recipe has had more repeats, or requests, since."""
    for field, values in (("repeats", (3, 6)), ("requests", (0, 2)), ("seed", (0, 1)), ("batches", ([1], [1, 4]))):
        first, second = (Workload([100], 3, **{"batches": [1], field: value}) for value in values)
        rows = [a_row(workload=first), a_row("q", workload=first), a_row("q", workload=second)]
        shown = varying(*rows)
        (name,) = shown
        assert name in (field, "batch") and shown[name][1] != shown[name][2], (field, shown)
    more = Workload([100], 5, [1], repeats=6)
    rows = [a_row("q", workload=Workload([100], 5, [1])), a_row("q", workload=more), a_row()]
    assert [*varying(*rows)] == ["workload", "repeats"] or [*varying(*rows)] == ["repeats"]


def test_tasks_are_those_of_all_engines_of_the_newest_recipe() -> None:
    """The newest row may be of an engine that has no harness."""

    def asked(row: Row, right: list[float], **more: Any) -> Row:
        task = Task("arc", "t.json", "d-arc", len(right), 50, harness=True)
        return replace(on(row, tasks={"arc": {"correct": right}}), tasks={"arc": task}, **more)

    rows = [
        asked(a_row("base", "transformers"), [1.0, 1.0, 0.0]),
        asked(a_row("q", "transformers"), [1.0, 0.0, 0.0]),
        a_row("base", "vllm", started_at="2026-11-21T12:00:00Z"),
    ]
    table = build(rows)
    assert [*table.tasks] == ["arc"]
    scores = {line.row.key: line.tasks.get("arc") for line in table.lines}
    assert [score.accuracy.value if score else None for score in scores.values()] == [2 / 3, None, 1 / 3]
    older = replace(rows[0], recipe_digest="before the task was left out of the recipe")
    assert not build([older, rows[2]]).tasks
