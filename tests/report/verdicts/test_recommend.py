"""The choice under limits, the Pareto front, what each rejected variant failed on; noise decides nothing."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tests.rows import a_row
from workbench.errors import UserError
from workbench.records import Row
from workbench.report import store
from workbench.report.table import build
from workbench.report.verdicts import recommend as wing
from workbench.report.verdicts.recommend import Constraints, Recommendation, parse_share, recommend
from workbench.sizes import parse_size
from workbench.worker.backends import serving_command

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
    assert why["base"] == ("memory 800 MiB, at most 700 MiB", "decode 60.0 tok/s, at least 65")
    assert why["q4"] == ("perplexity +10.52%, at most +1.50%",)
    assert len(why["silly"]) == 3
    assert why["awq"] == ("cannot run: llama.cpp reads GGUF files only",)
    assert why["broken"] == ("failed: ValueError: all logits are NaN",)
    assert "base on vllm" not in found.rejected  # another engine was not asked about


def test_the_front_is_what_nothing_dominates_whatever_the_limits() -> None:
    assert names(ask(house(), backend="llamacpp").front) == ["q4", "q6", "q8", "base"]
    assert names(ask(house(), backend="llamacpp", memory_bytes=1).front) == ["q4", "q6", "q8", "base"]
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
    assert f"note: q4 on llamacpp: {why}" in wing.text(found)
    # Limits of quality are not met by it; by what else it is good at it may win.
    assert ask(rows, max_kld=0.1).rejected["q4 on llamacpp"][0] == why
    alone = ask(rows[:2], sort="size").choice
    assert alone is not None and ask(rows[1:2]).choice.doubts == (why,)  # type: ignore[union-attr]


def test_windows_that_disagree_do_not_decide() -> None:
    noisy = [total + extra for total, extra in zip(BASE_NATS, (30.0, -28.0, 20.0, -10.0), strict=True)]
    found = ask([made("base", 60), made("q", 90, windows=noisy)], sort="quality")
    assert found.choice is not None and found.choice.name == "q on llamacpp"
    # Its mean is 0.75 % worse. A limit is a promise: what is over it is rejected, however few the windows; what is
    # under it is kept, and the few windows are told.
    found = ask([made("base", 60), made("q", 90, windows=noisy)], max_perplexity=0.005)
    assert found.choice is not None and found.choice.name == "base on llamacpp"
    assert found.rejected == {"q on llamacpp": ("perplexity +0.75%, at most +0.50%",)}
    found = ask([made("base", 60), made("q", 90, windows=noisy)], max_perplexity=0.01)
    assert found.choice is not None and found.choice.name == "q on llamacpp"
    assert any("too few windows to be sure of 1.00%" in doubt for doubt in found.choice.doubts)


def test_a_limit_missed_by_noise_is_a_note() -> None:
    found = ask([made("base", 60), made("q", 99, scatter=0.03)], min_decode_tok_s=100)
    assert found.choice is not None and found.choice.doubts == (
        "decode 99.0 tok/s is under 100, but by no more than noise",
    )
    assert "note: decode 99.0" in wing.text(found)
    assert ask([made("base", 60), made("q", 99)], min_decode_tok_s=100).choice is None


def test_what_was_not_measured_cannot_meet_a_limit() -> None:
    rows = [made("base", 60, evaluation=None), made("q", 90, evaluation=None)]
    found = ask(rows, max_perplexity=0.01, max_kld=0.1)
    assert found.choice is None and found.command is None
    assert found.rejected["q on llamacpp"] == ("perplexity was not measured", "divergence was not measured")
    assert "Nothing fits" in wing.text(found)


def test_memory_on_a_gpu_is_the_devices() -> None:
    row = a_row("q", memory={"peak_rss": 5000 * MIB, "peak_vram": 900 * MIB})
    assert row.measurement is not None
    row = replace(row, measurement=replace(row.measurement, device="NVIDIA H100"))
    assert ask([row], memory_bytes=1000 * MIB).choice is not None
    assert ask([row], memory_bytes=800 * MIB).choice is None


@pytest.mark.parametrize(
    ("backend", "options", "command"),
    [
        ("llamacpp", {"threads": 4}, "llama-server --model '/a b/q' --threads 4 --host 127.0.0.1 --port 8080"),
        (
            "llamacpp",
            {"gpu_layers": 12},
            "llama-server --model '/a b/q' --n-gpu-layers 12 --host 127.0.0.1 --port 8080",
        ),
        ("vllm", {"enforce_eager": True}, "vllm serve '/a b/q' --enforce-eager --host 127.0.0.1 --port 8000"),
        ("transformers", {}, "transformers serve '/a b/q' --host 127.0.0.1 --port 8000"),
        ("fake", {}, None),
    ],
)
def test_the_command_that_serves_it(backend: str, options: dict[str, Any], command: str | None) -> None:
    row = a_row("q", backend, options=options)
    row = replace(row, artifact=replace(row.artifact, path="/a b/q"))
    assert serving_command(row) == command
    moved = replace(row, artifact=replace(row.artifact, path="$WORKBENCH_HOME/q"))
    assert command is None or "/home/me/cache/q" in (serving_command(moved, "/home/me/cache") or "")


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
    assert re.search(r"q4 on llamacpp +perplexity \+10.52%, at most \+1.50%", done.stdout)
    assert "llama-server --model q6.gguf" in done.stdout
    record = json.loads(run(*wish, "--format", "json").stdout)
    assert record["choice"]["variant"] == "q6" and record["rejected"]["awq on llamacpp"]
    assert run("--memory", "1MiB").returncode == 1
    wrong = run("--memory", "8")
    assert wrong.returncode == 2 and "write a size with its unit" in wrong.stderr
