"""Rows made by hand, and the stored ones, for the tests of whatever reads rows."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from tests.places import ROOT
from workbench.records import Artifact, Evaluation, Machine, Measurement, Row, Speed, Workload

ENGINES = ("transformers", "vllm", "llamacpp")
REAL = sorted(ROOT.glob("results/*/rows.jsonl"))


def a_row(
    variant: str = "base",
    backend: str = "llamacpp",
    *,
    method: str | None = None,
    key: str | None = None,
    base: str = "Toy-1M",
    machine: str = "desk",
    windows: list[tuple[int, float]] | None = None,
    first_token_s: list[float] | None = None,
    step_s: list[list[float]] | None = None,
    batch: int = 1,
    evaluation: str | None = "e1",
    memory: dict[str, Any] | None = None,
    measured: bool = True,
    **more: Any,
) -> Row:
    """A row as the pipeline writes it; `windows` are (tokens scored, summed nats)."""
    first_token_s = [0.5, 0.4, 0.8] if first_token_s is None else first_token_s
    step_s = [[0.1, 0.1], [0.05, 0.05], [0.2, 0.2]] if step_s is None else step_s
    windows = [(4, 8.0), (4, 10.0), (4, 9.0)] if windows is None else windows
    speed = Speed(100, 3, batch, first_token_s, step_s, [[batch] * len(steps) for steps in step_s])
    quality = {"windows": [{"count": n, "nonfinite": 0, "nll_sum": total} for n, total in windows]}
    measurement = Measurement(
        device="cpu",
        load_s=1.5,
        speeds=[speed],
        qualities={"prose": quality} if evaluation else {},
        memory={"peak_rss": 300 * 2**20} if memory is None else memory,
    )
    values: dict[str, Any] = {
        "key": key or f"{base}/{variant}/{backend}/{evaluation}",
        "base": base,
        "recipe": "toy",
        "recipe_digest": "r",
        "artifact": Artifact(
            variant=variant,
            method=method or ("base" if variant == "base" else "gguf"),
            format="gguf",
            path=f"{variant}.gguf",
            digest=f"d-{variant}",
            disk_bytes=2_000_000,
            parameters=1_000_000,
        ),
        "backend": backend,
        "workload": Workload(prompt_tokens=[100], new_tokens=3, batches=[batch]),
        "evaluations": {
            "prose": Evaluation(
                "prose", "e.json", evaluation, 8, "second-half", len(windows), sum(count for count, _ in windows)
            )
        }
        if evaluation
        else {},
        "measurement": measurement if measured else None,
        "machine": Machine(machine),
        "versions": {"toy": "1.0"},
        "started_at": "2026-11-21T10:00:00Z",
        "duration_s": 3.0,
    }
    return Row(**(values | more))


def demo_rows() -> list[Row]:
    """Backend by backend, as the pipeline runs them."""
    return [
        a_row("base", "transformers", windows=[(4, 8.0), (4, 10.0), (4, 9.0)]),
        a_row("base", "vllm", windows=[(4, 8.01), (4, 10.0), (4, 9.0)]),
        a_row("Q2_K", "vllm", measured=False, unsupported="vLLM has no GGUF on a CPU"),
        a_row("Q8_0", "vllm", measured=False, unsupported="vLLM has no GGUF on a CPU"),
        a_row("Q8_0", "llamacpp", windows=[(4, 8.1), (4, 10.1), (4, 9.1)], warnings=["the machine was busy"]),
        a_row("base", "llamacpp", windows=[(4, 8.0), (4, 10.0), (4, 9.02)]),
        a_row("Q2_K", "llamacpp", measured=False, error="ValueError: all logits are NaN"),
    ]


def wide_rows() -> list[Row]:
    """As the demo makes them: three engines, eight types, big and small numbers."""
    rows = []
    for backend in ("transformers", "vllm", "llamacpp"):
        rows.append(a_row("base", backend, windows=[(2560, 6289.0), (2560, 6289.7)]))
        for step, name in enumerate(("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0", "Q3_K_M", "Q2_K")):
            if backend == "vllm":
                rows.append(
                    a_row(f"gguf-{name}", backend, measured=False, unsupported="vLLM 0.32 has no GGUF on a CPU")
                )
                continue
            row = a_row(
                f"gguf-{name}",
                backend,
                windows=[(2560, 6300.0 + step**3.5 * 8), (2560, 6310.0 + step**3.5 * 8)],
                first_token_s=[0.11 + 0.003 * step, 0.112, 0.11],
                memory={"peak_rss": 913 * 2**20 - step},
            )
            rows.append(replace(row, artifact=replace(row.artifact, disk_bytes=92 * 2**20 - step * 10**6)))
    return rows


def losing(row: Row, lost: list[int]) -> Row:
    """The row as if so many tokens of each window had NaN logits, and the others the same mean."""
    assert row.measurement is not None and row.quality is not None
    windows = []
    for window, gone in zip(row.quality["windows"], lost, strict=True):
        left = window["count"] - gone
        share = left / window["count"]
        sums = {name: value * share for name, value in window.items() if name.endswith("_sum")}
        counts = {name: left for name in window if name in ("count", "kld_count")}
        windows.append(window | sums | counts | {"nonfinite": gone})
    quality = row.quality | {"windows": windows}
    return replace(row, measurement=replace(row.measurement, qualities={"prose": quality}))


def compared(row: Row, kld: float, reference: str = "r1") -> Row:
    """The row as if compared with a reference: `kld` nats a token, every second top token the base's."""
    assert row.measurement is not None and row.quality is not None
    windows = [
        window
        | {
            "kld_count": window["count"],
            "kld_sum": kld * window["count"],
            "kld_low_sum": 0.9 * kld * window["count"],
            "same_top_sum": window["count"] // 2,
            "dp_square_sum": 0.01 * window["count"],
        }
        for window in row.quality["windows"]
    ]
    quality = {"windows": windows, "reference_digest": reference}
    return replace(row, measurement=replace(row.measurement, qualities={"prose": quality}))


def a_house(count: int, seed: int = 0) -> list[Row]:
    """`count` rows on three engines as large as real ones: 31 steps in 3 repeats, 6 windows, divergences."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        variant = "base" if number < 3 else f"gguf-Q{number // 3}_K_M-imatrix"
        speed = math.exp(chance.uniform(2, 5))
        row = a_row(
            variant,
            ENGINES[number % 3],
            windows=[(255, 255 * chance.uniform(2.6, 3.4)) for _ in range(6)],
            step_s=[[chance.lognormvariate(-math.log(speed), 0.05) for _ in range(31)] for _ in range(3)],
            memory={
                "weights": chance.randrange(10**8),
                "kv_cache": 10**7,
                "peak_rss": 8 * 10**8,
                "peak_rss_anon": chance.randrange(10**9),
                "peak_rss_file": chance.randrange(10**9),
            },
        )
        assert row.measurement is not None and row.quality is not None
        windows = [
            window
            | {
                "kld_count": 255,
                "kld_sum": 255 * chance.uniform(0.001, 2),
                "kld_low_sum": 0.0,
                "same_top_sum": 200,
                "dp_square_sum": 1.0,
                "kld": [chance.lognormvariate(-2, 1) for _ in range(255)],
            }
            for window in row.quality["windows"]
        ]
        quality = {"windows": windows, "reference_digest": "r"}
        rows.append(replace(row, measurement=replace(row.measurement, qualities={"prose": quality})))
    return rows
