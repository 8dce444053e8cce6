"""Divergence from end to end: the reference is made once a recipe and used by every job, rows stay small, and each
scoring convention scores the positions it says.

The fake engine's logits are noise, the reference is the tiny Llama's own, made by transformers.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.places import ROOT
from tests.rows import a_row
from workbench.profile import reference
from workbench.records import Evaluation, Job, Measurement, Reference, Workload, from_json, to_json
from workbench.report import estimates as statistics
from workbench.worker.backends import BACKENDS
from workbench.worker.measure import job as profile
from workbench.worker.scoring.reducer import compact
from workbench.worker.tokens import windows as corpus

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4


# --- the conventions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "first", "counts"),
    [
        ({"score": "second-half"}, [16, 16, 16], [15, 15, 15]),
        ({"score": "all"}, [0, 0, 0], [31, 31, 31]),
        ({"score": "strided", "stride": 8}, [0, 23, 23], [31, 8, 8]),
    ],
)
def test_each_convention_scores_the_positions_it_says(
    convention: dict[str, Any],
    first: list[int],
    counts: list[int],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the text through `corpus.build`, the job and the engine to the losses, which are worked out again here."""
    import torch

    monkeypatch.setitem(BACKENDS, "fake", "workbench.worker.backends.fake")
    entry = {
        "role": "evaluation",
        "name": "e",
        "source": {"text": TEXT},
        "window": 32,
        "windows": 3,
        "out": str(tmp_path / "e.json"),
        **convention,
    }
    (made,) = corpus.build({"base": str(tiny_llama), "sets": [entry]}, lambda *_: None)["sets"]
    job = Job(
        base="Tiny",
        artifact=a_row().artifact,
        backend="fake",
        options={},
        workload=Workload(prompt_tokens=[8], new_tokens=2, repeats=1),
        evaluations={"e": from_json(Evaluation, made)},
    )
    answered: Measurement = from_json(Measurement, profile.measure(to_json(job), lambda *_: None))
    measured = answered.qualities["e"]

    stored = json.loads((tmp_path / "e.json").read_text())
    assert stored["score_from"] == first
    assert [window["count"] for window in measured["windows"]] == counts
    assert made["scored_tokens"] == sum(counts)
    noise = torch.Generator().manual_seed(0)
    for ids, start, window in zip(stored["windows"], first, measured["windows"], strict=True):
        logits = torch.randn(len(ids) - start, stored["vocab_size"], generator=noise)
        # Row j is the prediction at position start + j; the one after the last scored has nothing to predict.
        losses = -logits.double().log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[start + 1 :])[:, None])[:, 0]
        assert window["nll_sum"] == pytest.approx(float(losses.sum()), rel=1e-6)
        assert statistics.unpacked(window["nll"]) == pytest.approx(losses.tolist(), rel=6e-4)


# --- what a row keeps ---------------------------------------------------------------------------


def reduced(windows: int = 10, tokens: int = 255, lost: tuple[int, int] | None = None, seed: int = 0) -> dict[str, Any]:
    """A reducer's full answer, with a language model's spread of losses and divergences; token `lost` is NaN."""
    chance = random.Random(seed)
    found = []
    for w in range(windows):
        lists: dict[str, list[Any]] = {
            "nll": [float(f"{chance.expovariate(0.4):.6g}") for _ in range(tokens)],
            "kld": [float(f"{math.exp(chance.gauss(-5, 2)):.6g}") for _ in range(tokens)],
            "dp": [float(f"{chance.gauss(0, 0.05):.6g}") for _ in range(tokens)],
            "same_top": [int(chance.random() < 0.9) for _ in range(tokens)],
        }
        if lost is not None and lost[0] == w:
            for values in lists.values():
                values[lost[1]] = None
        kept = {name: [v for v in values if v is not None] for name, values in lists.items()}
        count = len(kept["nll"])
        found.append(
            {
                "count": count,
                "nonfinite": tokens - count,
                "nll_sum": sum(kept["nll"]),
                "kld_count": count,
                "kld_sum": sum(kept["kld"]),
                "kld_low_sum": 0.97 * sum(kept["kld"]),
                "same_top_sum": sum(kept["same_top"]),
                "dp_square_sum": sum(d * d for d in kept["dp"]),
                **lists,
            }
        )
    return {"windows": found, "reference_digest": "r", "top_k": 256, "tail_draws": 64, "vocab_size": 49152}


def test_a_row_of_2550_tokens_is_small_and_says_the_same() -> None:
    full, base = reduced(seed=1), reduced(seed=2)
    size = {
        is_base: len(json.dumps(to_json(compact(full, is_base)), separators=(",", ":"), allow_nan=False))
        for is_base in (0, 1)
    }
    assert len(json.dumps(full, separators=(",", ":"))) > 70_000
    assert size[0] < 10_000 and size[1] < 17_000
    small, small_base = compact(full, False), compact(base, True)
    for p in (0.5, 0.9, 0.99, 0.999, 1.0):
        # What is read from a list is rounded to float16, whose step is 2^-11 of the value at most; the rest is not.
        expected = statistics.divergence_quantile(full, p)
        assert statistics.divergence_quantile(small, p) == pytest.approx(expected, rel=2**-11)
    for name in ("perplexity", "divergence", "agreement", "rms_dp"):
        assert getattr(statistics, name)(small) == pytest.approx(getattr(statistics, name)(full), rel=1e-12), name
    assert statistics.bits_per_byte(small, 10_000) == pytest.approx(statistics.bits_per_byte(full, 10_000), rel=1e-12)
    expected_delta = statistics.perplexity_delta(full, base)
    assert statistics.perplexity_delta(small, small_base) == pytest.approx(expected_delta, rel=1e-12)
    assert statistics.nonfinite(small) == statistics.nonfinite(full)


def test_a_lost_token_is_paired_as_it_was_before() -> None:
    full, base = reduced(lost=(3, 17), seed=1), reduced(seed=2)
    small, small_base = compact(full, False), compact(base, True)
    assert [i for i, window in enumerate(small["windows"]) if "nll" in window] == [3]
    assert all("nll" in window for window in small_base["windows"])
    assert statistics.unpacked(small["windows"][3]["nll"])[17] is None
    assert statistics.unpacked(small["windows"][3]["kld"])[17] is None
    delta, expected = statistics.perplexity_delta(small, small_base), statistics.perplexity_delta(full, base)
    assert delta.windows == expected.windows == 10
    assert delta.value == pytest.approx(expected.value, abs=1e-3 * (expected.se or 0))
    json.dumps(to_json(small), allow_nan=False)


def test_a_broken_models_divergence_still_fits() -> None:
    full = reduced(windows=1)
    full["windows"][0]["kld"][:3] = [1e30, 1e-9, 70000.0]
    assert list(statistics.unpacked(compact(full, False)["windows"][0]["kld"])[:3]) == [65504.0, 0.0, 65504.0]


# --- the reference in a run ---------------------------------------------------------------------


def test_rows_of_a_lost_reference_are_measured_again_beside_new_ones() -> None:
    def row(key: str, reference: str | None) -> Any:
        found = a_row(key=key)
        assert found.measurement is not None and found.quality is not None
        quality = found.quality | {"reference_digest": reference}
        return replace(found, measurement=replace(found.measurement, qualities={"prose": quality}))

    rows = {"a": row("a", "new"), "b": row("b", "old"), "c": row("c", None), "d": a_row(key="d", measured=False)}
    assert set(reference.with_reference(rows, {"prose": Reference("new")})) == {"a", "c", "d"}
    assert set(reference.with_reference(rows, None)) == set(rows)  # nothing is measured: nothing to stand beside


def command(home: Path, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    own = {"WORKBENCH_HOME": str(home), "WORKBENCH_FAKE_BACKEND": "1", "PYTHONPATH": str(ROOT)}
    words = (*words, "--results", str(folder / "results"))
    return subprocess.run(
        [sys.executable, "-m", "workbench.cli", *words],
        cwd=folder,
        env={**os.environ, **own, **more},
        capture_output=True,
        text=True,
        timeout=600,
    )


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in folder.glob("results/*/rows.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_reference_is_made_once_and_only_for_jobs(tmp_path: Path, tiny_llama: Path) -> None:
    home, recipe = tmp_path / "home", tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "base": {"path": str(tiny_llama)},
                "model": "Tiny",
                "variants": [{"gguf": "Q8_0"}],
                "evaluation": {"source": {"text": TEXT}, "window": 32, "windows": 3},
                "workload": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
                "backends": {"fake": {}},
            }
        )
    )
    main = ("run", str(recipe), "-v", "base", "-f", "json")
    other = {"TMPDIR": str(tmp_path)}  # its lock is not that of a run that goes on beside this test

    # An interpreter that is not there has no transformers: perplexity alone, and the reason said.
    missing = str(tmp_path / "nothing" / "python")
    answer = command(home, tmp_path, *main, WORKBENCH_PYTHON_TRANSFORMERS=missing, **other)
    assert answer.returncode == 0, answer.stderr
    (bare,) = json.loads(answer.stdout)
    assert bare["perplexity"] > 1 and bare["kld_mean"] is None
    assert answer.stderr.count("no divergence: transformers, which scores the base for it, is not installed here.") == 1
    assert not (home / "references").exists()

    # Its row does not pass for one with divergence.
    answer = command(home, tmp_path, *main, **other)
    assert answer.returncode == 0, answer.stderr
    (found,) = json.loads(answer.stdout)
    assert found["kld_mean"] > 0.1 and 0 <= found["top1_agreement"] < 0.5 and found["kld_p50"] <= found["kld_max"]
    assert found["key"] != bare["key"]
    assert "reference: base's distributions" in answer.stderr
    (made,) = (home / "references").iterdir()
    record = json.loads((made / "reference.json").read_text())
    assert sorted(file.name for file in made.iterdir()) == ["reference.json", "reference.safetensors"]
    assert record["settings"]["dtype"] == "float32" or record["settings"]["device"] == "cuda"
    assert (
        next(iter(rows_in(tmp_path)[-1]["measurement"]["qualities"].values()))["reference_digest"] == record["digest"]
    )

    # Nothing to measure: nothing made, even if the reference is gone.
    made.rename(tmp_path / "gone")
    answer = command(home, tmp_path, *main, **other)
    assert answer.returncode == 0 and json.loads(answer.stdout) == [found]
    assert len(rows_in(tmp_path)) == 2 and not made.exists()
    assert "reference" not in answer.stderr

    # A base that cannot be scored costs the divergence, not the run: here its interpreter has the packages and dies.
    broken = tmp_path / "python"
    script = 'case "$*" in *isolate*) echo out of order; exit 3;; esac'
    broken.write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    answer = command(home, tmp_path, *main, "--again", WORKBENCH_PYTHON_TRANSFORMERS=str(broken), **other)
    assert answer.returncode == 0, answer.stderr
    assert "no divergence: scoring the base for it failed: the worker ended with exit code 3" in answer.stderr
    assert json.loads(answer.stdout)[0]["kld_mean"] is None
    assert next(iter(rows_in(tmp_path)[-1]["measurement"]["qualities"].values()))["reference_digest"] is None
