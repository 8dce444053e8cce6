"""The choice under limits, the Pareto front, what each rejected variant failed on; noise decides nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tests.rows import a_row, compared, losing
from workbench.errors import UserError
from workbench.records import Row, Workload
from workbench.report import store
from workbench.report.table import build
from workbench.report.verdicts.recommend import Constraints, Recommendation, parse_share, recommend
from workbench.sizes import parse_size

MIB = 2**20
BASE_NATS = [900.0, 960.0, 880.0, 930.0]


def made(
    variant: str,
    tok_s: float,
    nats: float = 0.0,
    mib: int = 300,
    disk_mib: int = 200,
    backend: str = "llamacpp",
    scatter: float = 0.002,
    windows: list[float] | None = None,
    **more: Any,
) -> Row:
    """A variant that decodes at `tok_s` and costs `nats` more than the base in each window of 400 tokens."""
    rates = [tok_s * (1 - scatter), tok_s, tok_s * (1 + scatter)]
    totals = windows or [total + nats for total in BASE_NATS]
    row = a_row(
        variant,
        backend,
        windows=[(400, total) for total in totals],
        step_s=[[1 / r, 1 / r] for r in rates],
        memory={"peak_rss": mib * MIB},
        **more,
    )
    return replace(row, artifact=replace(row.artifact, disk_bytes=disk_mib * MIB))


def names(candidates: Any) -> list[str]:
    return [one.name.removesuffix(" on llamacpp") for one in candidates]


def house() -> list[Row]:
    """A base on two engines 0.02 % apart, and variants that trade quality for speed."""
    return [
        made("base", 60, mib=800, disk_mib=360),
        made("base", 26, backend="vllm", nats=0.08, mib=1700, disk_mib=360),
        made("q8", 70, nats=0.8, mib=600, disk_mib=190),
        made("q6", 80, nats=4, mib=550, disk_mib=150),
        made("q4", 95, nats=40, mib=500, disk_mib=110),
        made("silly", 50, nats=60, mib=900, disk_mib=400),
        a_row("awq", measured=False, unsupported="llama.cpp reads GGUF files only"),
        a_row("broken", measured=False, error="ValueError: all logits are NaN"),
    ]


def ask(rows: list[Row], **constraints: Any) -> Recommendation:
    return recommend(build(rows), Constraints(**constraints))


def test_the_fastest_within_limits_and_why_not_the_others() -> None:
    found = ask(house(), max_perplexity=0.015, min_decode_tok_s=65, memory_bytes=700 * MIB, backend="llamacpp")
    assert found.choice is not None and found.choice.name == "q6 on llamacpp"
    assert names(found.fitting) == ["q6", "q8"]
    why = {name.removesuffix(" on llamacpp"): reasons for name, reasons in found.rejected.items()}
    assert why["base"] == ("memory 800 MiB, at most 700 MiB", "decode 60.0 tok/s (59.7 to 60.3), at least 65.0 tok/s")
    assert why["q4"] == ("perplexity +10.52%, at most +1.50%",)
    assert len(why["silly"]) == 3
    assert why["awq"] == ("cannot run: llama.cpp reads GGUF files only",)
    assert why["broken"] == ("failed: ValueError: all logits are NaN",)
    assert "base on vllm" not in found.rejected  # another engine was not asked about


def test_the_front_is_what_nothing_dominates_whatever_the_limits() -> None:
    # q8 costs 0.2 % of the perplexity, which is nothing that matters: the base is better in nothing.
    assert names(ask(house(), backend="llamacpp").front) == ["q4", "q6", "q8"]
    assert names(ask(house(), backend="llamacpp", memory_bytes=1).front) == ["q4", "q6", "q8"]
    assert "base on vllm" not in names(ask(house()).front)


@pytest.mark.parametrize(("sort", "choice"), [("speed", "q4"), ("quality", "base"), ("memory", "q4"), ("size", "q4")])
def test_by_what_was_asked_for(sort: str, choice: str) -> None:
    found = ask(house(), sort=sort)
    assert found.choice is not None and found.choice.name == f"{choice} on llamacpp"


def test_a_speed_within_the_noise_does_not_decide() -> None:
    rows = [made("base", 60), made("fast", 100.5, nats=40, scatter=0.02), made("good", 100, nats=4, scatter=0.02)]
    found = ask(rows)
    assert found.choice is not None and found.choice.name == "good on llamacpp"  # better, and as fast as can be told
    assert found.tied == ("fast on llamacpp",)
    rows[1] = made("fast", 130, nats=40, scatter=0.02)
    found = ask(rows)
    assert found.choice is not None and found.choice.name == "fast on llamacpp" and found.tied == ()


def test_a_quality_within_the_noise_floor_does_not_decide() -> None:
    base = [made("base", 60), made("base", 26, backend="vllm", nats=4.0)]  # engines alone make 1 %
    found = ask([*base, made("q", 90, nats=2.0)], sort="quality")
    assert found.choice is not None and found.choice.name == "q on llamacpp"
    assert names(found.front) == ["q"]
    quiet = [made("base", 60), made("base", 26, backend="vllm", nats=0.01)]
    found = ask([*quiet, made("q", 90, nats=2.0)], sort="quality")
    assert found.choice is not None and found.choice.name == "base on llamacpp"


def test_a_type_that_the_base_was_stored_in_does_not_win_by_its_quality() -> None:
    """As Gemma 3 270M's public Q4_K_M file as the base: Q4_K_M loses 1e-6 of it, AWQ 0.1."""
    kinds = {"base": "BF16", "q4": "Q4_K", "q6": "Q6_K", "awq": "I4-g128"}
    rows = [made("base", 60), made("q4", 95), made("q6", 80, nats=0.8), made("awq", 96, nats=40)]
    rows = [
        replace(row, artifact=replace(row.artifact, tensor_types={"w": kinds[row.artifact.variant]})) for row in rows
    ]
    assert ask(rows[1:] + rows[:1], sort="quality").choice.line.row.artifact.variant == "q4"  # type: ignore[union-attr]
    rows = [replace(row, base_types=["Q4_K", "Q5_0"]) for row in rows]
    found = ask(rows[1:], sort="quality")
    assert found.choice is not None and found.choice.line.row.artifact.variant == "q6"
    why = "its quality decides nothing: the base was de-quantized from Q4_K, whose grid it shares"
    assert f"q4 on llamacpp: {why}" in " ".join(str(found).split())
    # Limits of quality are not met by it; by what else it is good at it may win.
    assert ask(rows, max_kld=0.1).rejected["q4 on llamacpp"][0] == why
    alone = ask(rows[:2], sort="size").choice
    assert alone is not None and ask(rows[1:2]).choice.notes[0] == why  # type: ignore[union-attr]


def test_windows_that_disagree_do_not_decide() -> None:
    noisy = [total + extra for total, extra in zip(BASE_NATS, (30.0, -28.0, 20.0, -10.0), strict=True)]
    # Nothing tells q from the base, but it may be 9 % worse: that few windows were scored is no merit.
    found = ask([made("base", 60), made("q", 90, windows=noisy)], sort="quality")
    assert found.choice is not None and found.choice.name == "base on llamacpp"
    # Its mean is 0.75 % worse. A limit is a promise: what is over it is rejected, however few the windows; of what is
    # under it few windows leave it undecided, and the base, which surely keeps it, goes before.
    found = ask([made("base", 60), made("q", 90, windows=noisy)], max_perplexity=0.005)
    assert found.choice is not None and found.choice.name == "base on llamacpp"
    assert found.rejected == {"q on llamacpp": ("perplexity +0.75%, at most +0.50%",)}
    found = ask([made("base", 60), made("q", 90, windows=noisy)], max_perplexity=0.01)
    assert found.choice is not None and found.choice.name == "base on llamacpp"
    assert found.hope is not None and found.hope.name == "q on llamacpp"
    (doubt,) = found.hope.doubts
    assert doubt.likely and doubt.cure == "windows" and doubt.words.startswith("perplexity +0.75% (-")
    assert "q on llamacpp would be chosen, were it known to keep: perplexity +0.75%" in " ".join(str(found).split())
    assert "more `windows` under `evaluation` in the recipe" in str(found)


BUSY = "the machine was busy: other processes took 1.4 cores on average"


def busy(row: Row, tok_s: float, scatter: float) -> Row:
    """The row as measured while others worked: three rates, each off by the factor `scatter`, and the warning."""
    assert row.measurement is not None
    steps = [[1 / tok_s * factor] * 2 for factor in (scatter, 1.0, 1 / scatter)]
    speed = replace(row.measurement.speeds[0], step_s=steps)
    return replace(row, measurement=replace(row.measurement, speeds=[speed]), warnings=[BUSY])


def test_a_bad_measurement_wins_nothing() -> None:
    """As the base of a busy night, at 11.7 tok/s (0.2 to 929.6): its interval overlaps everything, and it is best in
    quality."""
    noisy = busy(made("base", 60, disk_mib=360, mib=800), 11.7, 5.9)
    low, high = build([noisy]).lines[0].intervals["decode_tok_s"] or (0, 0)
    assert low < 0.3 and high > 900
    rows = [noisy, made("q8", 80, nats=0.8, scatter=0.01), made("q4", 84, nats=40, scatter=0.01)]
    found = ask(rows, min_decode_tok_s=50)
    assert found.choice is not None and found.choice.name == "q8 on llamacpp" and found.choice.standing == 0
    assert found.tied == ("q4 on llamacpp",), "and no tie is made by the noisiest"
    assert ask(rows).choice == found.choice, "without the limit neither"
    assert found.hope is None
    by_quality = ask(rows, min_decode_tok_s=50, sort="quality")
    assert by_quality.choice == found.choice
    # Where nothing else is left it is chosen, with its warning, its doubt and what to do next.
    alone = ask(rows, min_decode_tok_s=50, max_perplexity=0.0)
    assert alone.choice is not None and alone.choice.name == "base on llamacpp" and alone.choice.standing == 2
    told = " ".join(str(alone).split())
    assert f"note {BUSY}" in told and "undecided decode 11.7 tok/s (0." in told
    assert "workbench run RECIPE --again -v base -b llamacpp" in told


def test_what_is_decisively_slower_than_any_other_is_no_tie() -> None:
    """The fastest by its median is so noisy that 70 overlaps it; 70 and 100, both steady, do not overlap."""
    rows = [
        made("base", 50),
        made("noisy", 110, nats=9, scatter=0.4),
        made("fast", 100, nats=4, scatter=0.01),
        made("slow", 70, nats=0.8, scatter=0.01),
    ]
    found = ask(rows)
    assert found.choice is not None and found.choice.name == "fast on llamacpp" and found.tied == ()
    assert found.runner_up is not None and found.runner_up.name == "slow on llamacpp" and found.why == "speed"


def test_quality_is_the_divergence_where_there_is_one() -> None:
    """As GPTQ, whose perplexity two windows of luck bring near the base's, and compensated AWQ."""
    lucky = [total + extra for total, extra in zip(BASE_NATS, (60.0, -40.0, 30.0, -20.0), strict=True)]
    rows = [
        compared(made("base", 60), 1e-4),
        compared(made("base", 26, backend="vllm"), 7e-4),
        compared(made("gptq", 95, windows=lucky), 0.1436),
        compared(made("awq", 90, nats=25), 0.0778),
    ]
    for row, total in ((rows[2], 0.012), (rows[3], 0.009)):  # errors of the divergence, by windows
        for window, extra in zip(row.quality["windows"], (1, -1, 1, -1), strict=True):  # type: ignore[index]
            window["kld_sum"] += extra * total * 400
    assert ask(rows, sort="quality").choice.name.startswith("base on")  # type: ignore[union-attr]
    found = ask(rows, sort="quality", min_decode_tok_s=70)
    assert found.choice is not None and found.choice.name == "awq on llamacpp" and found.tied == ()
    assert found.why == "quality" and "divergence  0.0778 nat (" in str(found)


def test_a_perplexity_below_the_bases_does_not_hide_a_divergence() -> None:
    lucky = [0.97 * total for total in BASE_NATS]
    rows = [
        compared(made("base", 60), 1e-4),
        compared(made("gptq", 95, windows=lucky), 0.1436),
        compared(made("awq", 90, nats=25), 0.0778),
    ]
    found = ask(rows, sort="quality", min_decode_tok_s=70)
    assert found.choice is not None and found.choice.name == "awq on llamacpp" and found.tied == ()
    line = next(line for line in build(rows).lines if line.row.artifact.variant == "gptq")
    assert line.delta is not None and line.delta.value < 0, "by perplexity alone it would be the best of all"


def test_what_is_slower_by_less_than_matters_but_surely_is_no_tie() -> None:
    rows = [made("base", 50), made("good", 97, nats=0.8, scatter=0.002), made("fast", 100, nats=4, scatter=0.002)]
    found = ask(rows)
    assert found.choice is not None and found.choice.name == "fast on llamacpp" and found.tied == ()
    near = [made("base", 50), made("good", 97, nats=0.8, scatter=0.03), made("fast", 100, nats=4, scatter=0.03)]
    assert ask(near).choice.name == "good on llamacpp", "as near and not sure: quality decides"  # type: ignore[union-attr]


def test_a_limit_missed_by_noise_is_undecided() -> None:
    rows = [made("base", 60), made("q", 99, scatter=0.03)]
    found = ask(rows, min_decode_tok_s=100)
    assert found.choice is not None and [doubt.words for doubt in found.choice.doubts] == [
        "decode 99.0 tok/s (91.9 to 106.6), at least 100.0 tok/s"
    ]
    assert "undecided   decode 99.0" in str(found)
    better = ask([*rows, made("r", 101, nats=50, scatter=0.03)], min_decode_tok_s=100)
    assert better.choice is not None and better.choice.name == "r on llamacpp", "what is likely to hold goes before"
    assert ask([made("base", 60), made("q", 99)], min_decode_tok_s=100).choice is None


def test_what_was_not_measured_cannot_meet_a_limit() -> None:
    rows = [made("base", 60, evaluation=None), made("q", 90, evaluation=None)]
    found = ask(rows, max_perplexity=0.01, max_kld=0.1)
    assert found.choice is None and found.command is None
    assert found.rejected["q on llamacpp"] == ("perplexity was not measured", "divergence was not measured")
    assert "Nothing fits" in str(found)


def test_memory_on_a_gpu_is_the_devices() -> None:
    row = a_row("q", memory={"peak_rss": 5000 * MIB, "peak_vram": 900 * MIB})
    assert row.measurement is not None
    row = replace(row, measurement=replace(row.measurement, device="NVIDIA H100"))
    assert ask([row], memory_bytes=1000 * MIB).choice is not None
    assert ask([row], memory_bytes=800 * MIB).choice is None


def test_words_for_sizes_and_shares() -> None:
    assert parse_size("8GiB", "--memory") == 8 * 2**30
    assert parse_size("1.5 GB", "--memory") == 1.5e9
    assert parse_share("1%", "--max-perplexity") == (0.01, None)
    assert parse_share("12.5", "--max-perplexity") == (None, 12.5)
    for wrong in ("8", "GiB", "8 gigs", "-1GiB", ""):
        with pytest.raises(UserError, match="--memory"):
            parse_size(wrong, "--memory")
    with pytest.raises(UserError, match="--max-perplexity x%"):
        parse_share("x%", "--max-perplexity")


def test_lines_that_differ_only_in_an_option_are_both_told() -> None:
    rows = [
        made("base", 60),
        made("q", 90, options={"kv_cache": "f16"}, key="1"),
        made("q", 95, options={"kv_cache": "q8_0"}, key="2"),
    ]
    found = ask(rows, min_decode_tok_s=100)
    assert {name for name in found.rejected if name.startswith("q ")} == {
        "q on llamacpp (kv_cache f16)",
        "q on llamacpp (kv_cache q8_0)",
    }


def test_misspelt_words() -> None:
    with pytest.raises(UserError, match="unknown backend 'lamacpp'. Did you mean 'llamacpp'"):
        ask(house(), backend="lamacpp")
    with pytest.raises(UserError, match="unknown order 'fast'"):
        ask(house(), sort="fast")


def test_the_command_line(tmp_path: Path) -> None:
    for row in house():
        store.append(tmp_path, "desk", row)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return command("recommend", "--results", str(tmp_path), *words)

    wish = ("--memory", "700MiB", "--max-perplexity", "1.5%", "--min-decode", "20", "--backend", "llamacpp")
    done = run(*wish, "--sort", "speed")
    assert done.returncode == 0, done.stderr
    assert "Choice: q6 on llamacpp" in done.stdout
    assert "  q4 on llamacpp: perplexity +10.52%, at most +1.50%" in done.stdout
    assert "llama-server --model q6.gguf" in done.stdout
    assert "its files are not here: `workbench quantize` of recipe 'toy' makes them" in done.stderr
    assert ("llama-server is not here" in done.stderr) == (shutil.which("llama-server") is None)
    record = json.loads(run(*wish, "--format", "json").stdout)
    assert record["choice"]["variant"] == "q6" and record["rejected"]["awq on llamacpp"]
    assert run("--memory", "1MiB").returncode == 1
    wrong = run("--memory", "8")
    assert wrong.returncode == 2 and "write a size with its unit" in wrong.stderr


def test_quality_of_fewer_tokens_decides_nothing() -> None:
    """What is NaN on the harder tokens has fine numbers on the others."""
    base = compared(a_row(windows=[(255, 663.0), (255, 688.0), (255, 816.0), (255, 867.0)]), 0.0)
    sound = compared(a_row("sound", windows=[(255, 670.0), (255, 695.0), (255, 825.0), (255, 876.0)]), 0.03)
    broken = losing(compared(replace(sound, artifact=replace(sound.artifact, variant="nan")), 0.02), [0, 0, 255, 255])
    table = build([base, sound, broken])
    why = "its quality decides nothing: 510 of 1,020 scored tokens have NaN or infinite logits"
    assert recommend(table, Constraints(sort="quality")).choice.name == "base on llamacpp"  # type: ignore[union-attr]
    for wish in (Constraints(sort="quality", max_kld=0.05), Constraints(max_perplexity=0.5)):
        assert recommend(table, wish).rejected["nan on llamacpp"] == (why,)
    assert why in " ".join(str(recommend(table, Constraints(sort="quality"))).split())
    # What the base cannot do either is no fault of the variant's.
    table = build([losing(base, [0, 0, 255, 255]), losing(sound, [0, 0, 255, 255])])
    assert recommend(table, Constraints(max_perplexity=0.5)).rejected == {}


def test_two_workloads_of_one_variant_have_two_names() -> None:
    def timed(variant: str, seconds: float, repeats: int) -> Row:
        steps = [[seconds * (1 + 0.001 * i)] * 2 for i in range(repeats)]
        load = Workload([100], 3, [1], repeats=repeats)
        return a_row(variant, workload=load, step_s=steps, first_token_s=[0.5] * repeats, key=f"{variant}{repeats}")

    rows = [timed("base", 0.2, 3), timed("Q4", 0.1, 3), timed("Q4", 0.02, 6), timed("Q8", 0.05, 6)]
    found = recommend(build(rows), Constraints(min_decode_tok_s=30))
    assert found.choice is not None and found.choice.name == "Q4 on llamacpp (repeats 6)"
    assert "Q4 on llamacpp (repeats 3)" in found.rejected and found.choice.name not in found.rejected
