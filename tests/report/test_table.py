"""Which rows stand side by side, in what order, with which deltas, footnotes and notes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.rows import a_row, compared, demo_rows
from workbench.errors import UserError
from workbench.records import Measurement, Row, Workload
from workbench.report.formats import FORMATS
from workbench.report.formats.data import objects
from workbench.report.table import Table, build

PROMISED = {
    "base",
    "variant",
    "method",
    "format",
    "backend",
    "device",
    "bits_per_weight",
    "disk_bytes",
    "load_s",
    "peak_rss_bytes",
    "peak_vram_bytes",
    "prefill_tok_s",
    "decode_tok_s",
    "perplexity",
    "perplexity_delta",
    "warnings",
    "error",
    "unsupported",
    "perplexity_se",
    "perplexity_delta_se",
    "recipe",
    "machine",
}


def pairs(table: Table) -> list[tuple[str, str]]:
    return [(line.row.artifact.variant, line.row.backend) for line in table.lines]


def test_the_base_first_then_variants_as_first_seen() -> None:
    rows = demo_rows()
    assert pairs(build([*rows[2:], *rows[:2]])) == [
        ("base", "vllm"),
        ("base", "llamacpp"),
        ("base", "transformers"),
        ("Q2_K", "vllm"),
        ("Q2_K", "llamacpp"),
        ("Q8_0", "vllm"),
        ("Q8_0", "llamacpp"),
    ]


def test_objects_have_what_is_promised_and_no_nan() -> None:
    found = objects(build(demo_rows()))
    assert all(set(each) >= PROMISED for each in found)
    json.dumps(found, allow_nan=False)
    by_pair = {(each["variant"], each["backend"]): each for each in found}

    best = by_pair["Q8_0", "llamacpp"]
    own, base = math.exp(27.3 / 12), math.exp(27.02 / 12)
    assert best["perplexity"] == pytest.approx(own)
    assert best["perplexity_delta"] == pytest.approx(own - base)  # llama.cpp's base, not transformers'
    assert best["perplexity_delta_se"] < best["perplexity_se"]
    assert best["device"] == "cpu"
    assert best["prefill_tok_s"] == pytest.approx(200.0)
    assert best["prefill_tok_s_ci"][0] < 200 < best["prefill_tok_s_ci"][1]
    assert best["warnings"] == ["the machine was busy"]

    assert by_pair["base", "vllm"]["perplexity_delta"] == by_pair["base", "vllm"]["perplexity_delta_se"] == 0.0
    cannot = by_pair["Q8_0", "vllm"]
    assert cannot["unsupported"] == "vLLM has no GGUF on a CPU"
    assert cannot["error"] is cannot["load_s"] is cannot["perplexity"] is cannot["device"] is None
    assert cannot["disk_bytes"] == 2_000_000
    failed = by_pair["Q2_K", "llamacpp"]
    assert failed["error"] == "ValueError: all logits are NaN"
    assert failed["decode_tok_s"] is failed["perplexity_delta"] is failed["unsupported"] is None


def test_an_engine_that_runs_the_base_as_another_model_is_told_in_each_of_its_rows() -> None:
    """As llama.cpp without Mistral's sliding window (1.66 nats): all its numbers of quality are that model's."""
    rows = [compared(row, 1.66 if row.backend == "llamacpp" else 0.001) for row in demo_rows() if row.measurement]
    table = build(rows)
    for line in table.lines:
        told = [text for text in line.warnings if "runs the base as another model" in text]
        assert len(told) == (line.row.backend == "llamacpp"), line.row.backend
    (text,) = (text for text in table.footnotes if "another model" in text)
    assert text.startswith("llamacpp runs the base as another model: it differs there") and "by 1.660 nats" in text


def test_a_base_that_is_worse_than_guessing_is_told_in_each_of_its_engines_rows() -> None:
    """4 tokens at 2 to 2.5 nats each have a perplexity of 9.5."""
    for size, worse in ((10, False), (9, True)):
        rows = [replace(row, measurement=_of_vocabulary(row, size)) for row in demo_rows() if row.measurement]
        lines = build(rows).lines
        assert all(any("than guessing among its 9 tokens" in text for text in line.warnings) == worse for line in lines)


def _of_vocabulary(row: Row, size: int) -> Measurement:
    assert row.measurement is not None and row.quality is not None
    return replace(row.measurement, qualities={"prose": {**row.quality, "vocab_size": size}})


def test_footnotes_are_numbered_and_told_once() -> None:
    table = build(demo_rows())
    assert table.footnotes == (
        "ValueError: all logits are NaN",
        "the machine was busy",
        "vLLM has no GGUF on a CPU",
    )
    marks = {(line.row.artifact.variant, line.row.backend): line.footnotes for line in table.lines}
    assert marks["Q2_K", "vllm"] == marks["Q8_0", "vllm"] == (3,)
    assert marks["Q2_K", "llamacpp"] == (1,)
    assert marks["Q8_0", "llamacpp"] == (2,)
    assert marks["base", "vllm"] == ()


def test_the_noise_floor_is_the_bases_spread() -> None:
    (floor,) = build(demo_rows()).first.noise_floors
    assert floor.backends == ("transformers", "vllm", "llamacpp")
    assert (floor.low, floor.high) == (pytest.approx(math.exp(27 / 12)), pytest.approx(math.exp(27.02 / 12)))
    assert floor.relative == pytest.approx(math.expm1(0.02 / 12))
    lonely = build(demo_rows()[4:])
    assert lonely.first.noise_floors == ()
    assert any(note.startswith("noise floor unknown") for note in lonely.notes)


QUALITY = {
    "perplexity_se",
    "perplexity_delta_se",
    "kld_mean",
    "kld_mean_se",
    "kld_p50",
    "kld_p90",
    "kld_p99",
    "kld_p999",
    "kld_max",
    "top1_agreement",
    "top1_agreement_se",
    "rms_dp",
    "bits_per_byte",
    "nonfinite_tokens",
    "below_noise_floor",
}


def test_divergence_is_in_every_object_and_null_where_not_measured() -> None:
    rows = demo_rows()
    rows[4] = compared(rows[4], 0.02)
    found = {(each["variant"], each["backend"]): each for each in objects(build(rows))}
    assert all(set(each) >= QUALITY for each in found.values())
    best = found["Q8_0", "llamacpp"]
    assert (best["kld_mean"], best["kld_mean_se"]) == (pytest.approx(0.02), pytest.approx(0.0, abs=1e-12))
    assert (best["top1_agreement"], best["rms_dp"]) == (pytest.approx(0.5), pytest.approx(0.1))
    assert best["kld_p99"] is None  # this row has no list
    for pair in (("base", "vllm"), ("Q2_K", "llamacpp"), ("Q8_0", "vllm")):
        assert {found[pair][name] for name in QUALITY if "kld" in name or "top1" in name} == {None}
    assert found["Q2_K", "llamacpp"]["below_noise_floor"] is None


def test_divergences_from_two_references_do_not_stand_side_by_side() -> None:
    rows = [
        compared(a_row(started_at="2026-11-21T09:00:00Z"), 1e-4, "old"),
        compared(a_row("q"), 0.02, "new"),
        compared(a_row("other", base="Other-2M"), 0.03, "old"),
    ]
    base, q, other = build(rows, evaluation="e1").lines
    assert (other.row.base, other.values["kld_mean"]) == ("Other-2M", pytest.approx(0.03))  # a base of its own
    assert (base.values["kld_mean"], base.values["top1_agreement"], base.errors["kld_mean"]) == (None, None, None)
    assert base.values["perplexity"] is not None
    assert base.warnings == (
        "compared with another reference of the base (old, not new): measure it again to see its divergence",
    )
    assert q.values["kld_mean"] == pytest.approx(0.02)


def test_the_noise_floor_has_the_bases_own_divergence() -> None:
    rows = [compared(a_row("base", "transformers"), 1e-9), compared(a_row("base", "vllm"), 3e-4), a_row()]
    (floor,) = build(rows).first.noise_floors
    assert floor.divergences == (("transformers", pytest.approx(1e-9)), ("vllm", pytest.approx(3e-4)))
    assert floor.noise.divergence == pytest.approx(3e-4 - 1e-9)
    (alone,) = build([rows[0], a_row("base", "vllm")]).first.noise_floors
    assert alone.noise.divergence is None, "one engine's says nothing of how far they are apart"


def test_below_the_noise_floor_is_within_the_engines_or_not_distinct_from_zero() -> None:
    """Four windows of 400 tokens at exp(2.25); a nat more in each is 0.024 more perplexity."""

    def below(shifts: list[float], *engines: Row) -> bool | None:
        base = a_row(windows=[(400, 900.0), (400, 900.0), (400, 900.0), (400, 900.0)])
        row = a_row("q", windows=[(400, 900.0 + shift) for shift in shifts])
        return objects(build([base, row, *engines]))[-1]["below_noise_floor"]

    def elsewhere(nats: float) -> Row:
        return a_row("base", "vllm", windows=[(400, 900.0 + nats)] * 4)

    steady = [1.0, 1.001, 0.999, 1.0]
    assert below(steady) is None  # distinct from zero, but what engines do alone is not known
    assert below(steady, elsewhere(0.5)) is False
    assert below(steady, elsewhere(-1.1)) is True  # within the engines
    assert below([-x for x in steady], elsewhere(1.1)) is True
    # 1, 3 and 4 standard errors from zero: of four windows Student asks for 3.18, where 1.96 would be too few.
    assert below([1.0, 1.0, 1.0, -1.0], elsewhere(0.0)) is True
    assert below([1.0, 1.0, 1.0, 0.0]) is True
    assert below([1.0, 1.0, 1.0, 0.2], elsewhere(0.0)) is False


def test_a_delta_of_one_window_is_below_the_floor_or_unknown() -> None:
    def below(nats: float) -> bool | None:
        rows = [a_row(windows=[(4, 8.0)]), a_row("base", "vllm", windows=[(4, 8.1)]), a_row("q", windows=[(4, nats)])]
        return build(rows).lines[-1].below_noise_floor

    assert (below(8.05), below(8.5)) == (True, None)


def test_the_base_is_below_its_own_noise_floor() -> None:
    assert build([a_row()]).lines[0].below_noise_floor is True


def test_other_machines_are_left_out_and_counted() -> None:
    rows = [a_row(machine="desk"), *(a_row(v, machine="lab", started_at="2026-11-20T00:00:00Z") for v in "ab")]
    table = build(rows)
    assert (table.machine, len(table.lines)) == ("desk", 1)  # the newest row's
    assert "2 rows not shown: of another machine (lab)" in table.notes
    assert pairs(build(rows, machine="lab")) == [("a", "llamacpp"), ("b", "llamacpp")]
    with pytest.raises(UserError, match="unknown machine 'lap'. Did you mean 'lab'"):
        build(rows, machine="lap")


def test_other_measurement_versions_and_evaluations_are_left_out_and_counted() -> None:
    rows = [
        a_row(),
        a_row("old", measurement_version=0),
        a_row("elsewhere", evaluation="e2", started_at="2026-11-20T00:00:00Z"),
        a_row("speed-only", evaluation=None),
        a_row("other-base", base="Other-2M", evaluation=None),
    ]
    table = build(rows)
    assert [variant for variant, _ in pairs(table)] == ["base", "speed-only"]
    assert "1 row not shown: of another measurement version (0)" in table.notes
    assert "2 rows not shown: of another evaluation or base (prose e2, Other-2M)" in table.notes
    assert [variant for variant, _ in pairs(build(rows, evaluation="e2"))] == ["elsewhere", "speed-only"]


def test_one_recipe_with_its_bases_rows_from_another() -> None:
    rows = [
        a_row("base", recipe="first", started_at="2026-11-21T12:00:00Z"),
        a_row("base", evaluation="e2", recipe="first", started_at="2026-11-21T13:00:00Z"),
        a_row("Q8_0", recipe="first"),
        a_row("Q4_0", recipe="second"),
    ]
    table = build(rows, recipe="second")
    assert [variant for variant, _ in pairs(table)] == ["base", "Q4_0"]
    assert table.lines[1].delta is not None
    with pytest.raises(UserError, match="unknown recipe 'secnd'. Did you mean 'second'"):
        build(rows, recipe="secnd")


def test_the_latest_of_a_pair_is_shown() -> None:
    old, new = a_row(key="1"), a_row(key="2", versions={"toy": "2.0"}, started_at="2026-11-21T11:00:00+00:00")
    for rows in ([old, new], [new, old]):
        table = build(rows)
        assert [line.row.key for line in table.lines] == ["2"]
        assert any(note.startswith("1 row not shown: superseded") for note in table.notes)


def test_a_later_failure_of_the_same_files_does_not_hide_what_was_measured() -> None:
    old = a_row(key="1")
    failed = a_row(key="2", measured=False, error="cannot start /nope", started_at="2026-11-21T11:00:00+00:00")
    table = build([old, failed])
    assert [line.row.key for line in table.lines] == ["1"]
    assert "base on llamacpp was tried again and failed (cannot start /nope): what was measured before is shown" in (
        table.notes
    )
    other = replace(failed, artifact=replace(failed.artifact, digest="made anew"))
    assert [line.row.key for line in build([old, other]).lines] == ["2"], "the old figures are of other files"


def test_columns_that_vary_are_shown() -> None:
    def names(rows: list[Row]) -> list[str]:
        return [column.name for column in build(rows).varying]

    assert names(demo_rows()) == []
    two = replace(a_row(key="2"), options={"threads": 2})
    assert names([two, replace(a_row(key="4"), options={"threads": 4})]) == ["threads"]
    # Engines differ by nature: no column for what the backend already tells.
    assert names([two, replace(a_row(backend="vllm"), options={"dtype": "bf16"})]) == []
    longer = replace(a_row(measured=False), workload=Workload(prompt_tokens=[200], new_tokens=3))
    assert names([a_row(), longer]) == ["workload"]
    assert names([a_row(), a_row(base="Other-2M")]) == ["base"]


def test_deltas_are_against_the_base_with_the_same_options() -> None:
    def with_threads(row: Row, threads: int) -> Row:
        return replace(row, options={"threads": threads}, key=f"{row.key}{threads}")

    rows = [
        with_threads(a_row(windows=[(4, 8.0)]), 1),
        with_threads(a_row(windows=[(4, 8.4)]), 2),
        with_threads(a_row("q", windows=[(4, 9.0)]), 2),
    ]
    last = objects(build(rows))[-1]
    assert last["perplexity_delta"] == pytest.approx(math.exp(9 / 4) - math.exp(8.4 / 4))


def test_a_missing_delta_is_explained() -> None:
    (line,) = build([a_row("q")]).lines
    assert line.delta is None
    assert line.warnings == ("the base has no perplexity on llamacpp, so there is no delta",)
    line = build([a_row(), a_row("q", windows=[(4, 8.0)])]).lines[1]
    assert line.warnings == ("the base on llamacpp was scored on other tokens, so there is no delta",)


def test_a_base_with_tokens_that_are_not_finite_is_told_where_it_matters() -> None:
    base = a_row()
    assert base.measurement is not None and base.quality is not None
    base.quality["windows"][2] = {"count": 3, "nonfinite": 1, "nll_sum": 7.0}
    line = build([base, a_row("q", windows=[(4, 9.0), (4, 10.0), (4, 10.0)])]).lines[1]
    assert line.delta is not None
    assert line.delta.value == pytest.approx(math.exp(19 / 8) - math.exp(18 / 8))
    assert line.warnings == ("the delta leaves out tokens whose logits of the base on llamacpp are not finite (1)",)


def test_nothing_measured_yet() -> None:
    with pytest.raises(UserError, match=r"nothing measured yet: run `workbench run RECIPE`"):
        build([])


def steps_of(work: Callable[[], object]) -> int:
    """Instructions that are executed in the modules which put rows together; no clock."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(("report/table.py", "report/selection.py")):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_twice_the_lines_are_twice_the_work() -> None:
    def rows(many: int) -> list[Row]:
        bases = [a_row("base", backend) for backend in ("transformers", "vllm", "llamacpp")]
        return bases + [a_row(f"q{place}", bases[place % 3].backend, method="gguf") for place in range(many)]

    def made(many: int) -> str:
        return FORMATS["terminal"](build(rows(many)))

    one, two = (steps_of(partial(made, many)) for many in (100, 200))
    assert 1.5 < two / one < 2.2
