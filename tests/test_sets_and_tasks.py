"""Several evaluation sets and tasks in one recipe, from the recipe to every form of the table."""

from __future__ import annotations

import csv
import io
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
from workbench.errors import UserError
from workbench.profile import jobs
from workbench.quantize.make import Made
from workbench.recipe.load import parse
from workbench.records import Artifact, Evaluation, Job, Measurement, PreparedBase, Task, Workload, from_json, to_json
from workbench.report import estimates as statistics
from workbench.report.formats import FORMATS
from workbench.report.formats.data import objects
from workbench.report.table import build
from workbench.worker.measure import job as profile
from workbench.worker.tokens import windows as corpus

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4
SET = {"source": {"text": "a"}}


def recipe(**more: Any) -> Any:
    return parse({"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}], **more}, Path("r.yaml"))


# --- the recipe ---------------------------------------------------------------------------------


def test_one_set_is_as_it_was() -> None:
    loaded = recipe(evaluation={**SET, "name": "e"})
    assert [*loaded.evaluations] == ["e"] and loaded.tasks == {}


def test_several_sets_have_their_names_and_conventions() -> None:
    loaded = recipe(evaluation={"wiki": SET, "c4": {**SET, "window": 2048, "score": "all"}, "s": {**SET, "windows": 3}})
    assert [(name, test.window, test.score) for name, test in loaded.evaluations.items()] == [
        ("wiki", 512, "second-half"),
        ("c4", 2048, "all"),
        ("s", 512, "second-half"),
    ]
    assert loaded.digest != recipe(evaluation={"wiki": SET}).digest


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"evaluation": {"a": SET, "b": {**SET, "windw": 8}}}, "evaluation.b: unknown key 'windw'. Did you mean"),
        ({"evaluation": {"a": {"sorce": {}, "window": 8}}}, "evaluation.a: unknown key 'sorce'. Did you mean"),
        ({"evaluation": {"a b": SET}}, "evaluation.a b: a name has letters"),
        ({"evaluation": {"a": {**SET, "name": "b"}}}, "evaluation.a: 'a' is its name"),
        ({"evaluation": {"sorce": {"text": "a"}}}, "evaluation: unknown key 'sorce'. Did you mean 'source'?"),
        ({"tasks": {"a": {"fle": "x"}}}, "tasks.a: unknown key 'fle'. Did you mean 'file'?"),
        ({"tasks": {"a": {}}}, "tasks.a: give exactly one of file, lm_eval (found none)"),
        ({"tasks": {"a": {"file": "x", "shots": 2}}}, "tasks.a: `shots` belongs to `lm_eval`"),
        ({"tasks": {"a": {"lm_eval": "x", "chat": True}}}, "tasks.a: `chat` belongs to `file`"),
        ({"tasks": {"a b": {"file": "x"}}}, "tasks.a b"),
    ],
)
def test_mistakes_are_answered(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(**more)
    assert message in str(caught.value)


# --- the table ----------------------------------------------------------------------------------


def an_evaluation(name: str, digest: str) -> Evaluation:
    return Evaluation(name, f"{name}.json", digest, 16, "all", 3, 45, 100)


def rows() -> list[Any]:
    """The base and a variant in one engine, the base in another; on a second set the order of losses is another."""
    task = Task("mine", "mine.json", "t1", 4, 20)
    sums = {"base": (30.0, [1, 1, 1, 0]), "Q4": (36.0, [1, 0, 1, 0])}
    found = []
    for variant, backend, shift in (("base", "llamacpp", 0.0), ("base", "vllm", 0.2), ("Q4", "llamacpp", 0.0)):
        total, correct = sums[variant]
        windows = [{"count": 15, "nonfinite": 0, "nll_sum": total + shift + i} for i in range(3)]
        row = a_row(variant, backend, tasks={"mine": task})
        qualities = row.measurement.qualities | {"c4": {"windows": windows}}
        measured = replace(row.measurement, qualities=qualities, tasks={"mine": {"correct": correct}})
        sets = row.evaluations | {"c4": an_evaluation("c4", "d2")}
        found.append(replace(row, evaluations=sets, measurement=measured))
    return found


def test_each_set_has_its_own_numbers_deltas_and_noise() -> None:
    table = build(rows())
    records = {(each["variant"], each["backend"]): each for each in objects(table)}
    own = records["Q4", "llamacpp"]["evaluations"]["c4"]
    assert own["perplexity"] == pytest.approx(math.exp(37 / 15))
    assert own["perplexity_delta"] == pytest.approx(math.exp(37 / 15) - math.exp(31 / 15))
    assert own["perplexity_delta_se"] < own["perplexity_se"]
    assert own["below_noise_floor"] is False
    assert own["bits_per_byte"] == pytest.approx(37 / 15 * 45 / 100 / math.log(2))
    assert (own["window"], own["score"], own["evaluation_digest"], own["kld_mean"]) == (16, "all", "d2", None)
    (floor,) = table.sets["c4"].noise_floors
    assert floor.spread == pytest.approx(math.exp(31.2 / 15) - math.exp(31 / 15))
    # The first set's keys are what they are without any other.
    alone = objects(build([replace(row, evaluations={"prose": row.evaluation}, tasks={}) for row in rows()]))
    for record, single in zip(objects(table), alone, strict=True):
        assert {**record, "evaluations": {}, "tasks": {}} == single


def test_accuracies_are_paired_with_the_base() -> None:
    records = {(each["variant"], each["backend"]): each["tasks"]["mine"] for each in objects(build(rows()))}
    base, own = records["base", "llamacpp"], records["Q4", "llamacpp"]
    assert base["accuracy"] == 0.75 and base["accuracy_delta"] == 0 and base["items"] == 4
    assert base["accuracy_se"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert own["accuracy"] == 0.5 and own["accuracy_delta"] == -0.25
    assert own["accuracy_delta_se"] == pytest.approx(0.25)  # one of four differs: sd 0.5, over sqrt(4)
    assert own["below_noise_floor"] is True


def test_other_tokens_and_other_items_are_not_compared() -> None:
    found = rows()
    found[2] = replace(
        found[2],
        evaluations=found[2].evaluations | {"c4": an_evaluation("c4", "other")},
        tasks={"mine": Task("mine", "m", "t2", 4, 20)},
        started_at="2026-11-20T10:00:00Z",
    )
    (own,) = [each for each in objects(build(found)) if each["variant"] == "Q4"]
    assert own["evaluations"]["c4"]["perplexity"] is None and own["evaluations"]["c4"]["perplexity_delta"] is None
    assert own["tasks"]["mine"]["accuracy"] is None
    assert own["perplexity"] is not None


def test_the_table_names_each_set_and_its_convention() -> None:
    table = build(rows())
    text = FORMATS["terminal"](table)
    assert "perplexity: prose, 3 windows of 8 tokens, second-half scored (llama.cpp's convention), 12 tokens" in text
    assert "perplexity: c4, 3 windows of 16 tokens, all scored (the papers' convention), 45 tokens" in text
    assert "accuracy: mine, 4 items; Δ acc: to the base, paired by item; 95 % intervals in brackets" in text
    assert "noise floor on c4: Toy-1M has perplexity" in text and "~: not to be told from the base" in text
    (heading,) = [line for line in FORMATS["markdown"](table).splitlines() if line.startswith("| variant")]
    for name in ("prose (ppl)", "prose (Δ ppl)", "c4 (ppl)", "c4 (Δ ppl)", "mine (acc %)", "mine (Δ acc)"):
        assert name in heading
    assert "~-25.0 (-53.6..+12.8)" in text and "50.0 (15.0..85.0)" in text
    (record,) = [each for each in csv.DictReader(io.StringIO(FORMATS["csv"](table))) if each["variant"] == "Q4"]
    assert float(record["evaluations.c4.perplexity"]) == pytest.approx(math.exp(37 / 15))
    assert float(record["tasks.mine.accuracy"]) == 0.5
    json.loads(FORMATS["json"](table))


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_an_accuracys_interval_covers_as_often_as_it_claims(share: float) -> None:
    chance = random.Random(7)
    hits = 0
    for _ in range(1000):
        base = [int(chance.random() < share) for _ in range(80)]
        own = [x if chance.random() < 0.8 else int(chance.random() < share) for x in base]
        one, two = statistics.share_interval(own), statistics.share_delta_interval(own, base)
        hits += (one[0] <= share <= one[1]) + (two[0] <= 0 <= two[1])
    assert 0.935 <= hits / 2000 <= 0.975


# --- the run ------------------------------------------------------------------------------------


def test_a_row_is_of_its_sets_and_tasks(tmp_path: Path) -> None:
    """Another set or another task is another row; a harness that is not installed is told, and its task left out."""
    loaded = recipe(evaluation={"a": SET, "b": SET}, backends={"llamacpp": None})
    artifact = Artifact("base", "base", "gguf", "b.gguf", "d", 1, 1)
    made = Made(PreparedBase("p", "b", "float32", 1, 4), {"base": [artifact]}, {}, {"a": an_evaluation("a", "d1")})

    def plan(**more: Any) -> Any:
        return jobs.planned_row(loaded, replace(made, **more), loaded.backends[0], "base", None)

    further = made.evaluations | {"b": an_evaluation("b", "d2")}
    mine = {"mine": Task("mine", "m.json", "t1", 4, 20)}
    keys = {plan().key, plan(evaluations=further).key, plan(evaluations=further, tasks=mine).key}
    keys.add(plan(tasks={"mine": Task("mine", "m.json", "t2", 4, 20)}).key)
    assert len(keys) == 4
    row = plan(evaluations=further, tasks=mine | {"arc": Task("arc", "a.json", "t3", None, 4096, True)})
    if row.versions.get("lm-eval"):
        assert set(row.tasks) == {"mine", "arc"} and not row.warnings
    else:
        assert set(row.tasks) == {"mine"}
        assert "Install it with: pip install lm-eval" in row.warnings[0]


def test_a_variant_with_another_tokenizer_is_refused(
    tiny_llama: Path, make_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, on the engine that reads the checkpoint; the base itself passes."""
    entry = {
        "role": "evaluation",
        "name": "e",
        "source": {"text": TEXT},
        "window": 32,
        "windows": 3,
        "score": "second-half",
        "out": str(tmp_path / "e.json"),
    }
    (made,) = corpus.build({"base": str(tiny_llama), "sets": [entry]}, lambda *_: None)["sets"]
    other = make_tokenizer(make_llama(tmp_path / "other"))
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    names = [name for name in vocabulary if len(name) == 1]
    moved = dict(zip(names, [vocabulary[name] for name in names[1:] + names[:1]], strict=True))
    stored["model"]["vocab"] = vocabulary | moved
    (other / "tokenizer.json").write_text(json.dumps(stored))

    def measure(path: Path) -> dict[str, Any]:
        job = Job(
            base="Tiny",
            artifact=Artifact("mine", "awq", "safetensors", str(path), "0", 0, 0),
            backend="transformers",
            options={"device": "cpu"},
            workload=Workload(repeats=0),
            evaluations={"e": from_json(Evaluation, made)},
        )
        return profile.measure(to_json(job), lambda *_: None)

    assert from_json(Measurement, measure(tiny_llama)).qualities
    with pytest.raises(UserError, match="mine has another tokenizer than the base: .* not comparable") as caught:
        measure(other)
    assert "in the base" in str(caught.value) and "\n" not in str(caught.value)


def test_a_vocabulary_that_one_engine_pads_changes_nothing(
    tiny_llama: Path, make_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """The same weights with 30 ids more, which the evaluation knows nothing of: the same losses to the last digit."""
    import torch
    from safetensors.torch import load_file, save_file

    padded = make_tokenizer(make_llama(tmp_path / "padded", vocab_size=384))
    tensors, own = load_file(tiny_llama / "model.safetensors"), load_file(padded / "model.safetensors")
    for name, tensor in tensors.items():
        own[name] = torch.cat([tensor, 9 * own[name][len(tensor) :]]) if len(own[name]) > len(tensor) else tensor
    save_file(
        {name: tensor.contiguous() for name, tensor in own.items()}, padded / "model.safetensors", {"format": "pt"}
    )
    entry = {
        "role": "evaluation",
        "name": "e",
        "source": {"text": TEXT},
        "window": 32,
        "windows": 3,
        "score": "second-half",
        "out": str(tmp_path / "e.json"),
    }
    (made,) = corpus.build({"base": str(tiny_llama), "sets": [entry]}, lambda *_: None)["sets"]
    sums = []
    for path in (tiny_llama, padded):
        job = Job(
            base="Tiny",
            artifact=Artifact("mine", "awq", "safetensors", str(path), "0", 0, 0),
            backend="transformers",
            options={"device": "cpu"},
            workload=Workload(repeats=0),
            evaluations={"e": from_json(Evaluation, made)},
        )
        measured = profile.measure(to_json(job), lambda *_: None)
        sums.append([window["nll_sum"] for window in measured["qualities"]["e"]["windows"]])
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.slow
def test_two_sets_and_a_task_in_three_real_engines(tmp_path: Path, real_home: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    pytest.importorskip("vllm")
    text = {"module": "pydoc_data.topics"}
    content = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text()) | {
        "name": "sets",
        "variants": [{"gguf": "Q4_0"}],
        "evaluation": {
            "topics": {"source": text, "window": 128, "windows": 3},
            "story": {"source": {"text": TEXT * 3}, "window": 64, "windows": 2, "score": "all"},
        },
        "tasks": {"everyday": {"file": str(ROOT / "recipes" / "tasks" / "everyday.yaml")}},
        "backends": {
            "transformers": {"variants": ["base"], "dtype": "bfloat16"},
            "llamacpp": {},
            "vllm": {"variants": ["base"], "enforce_eager": True, "dtype": "bfloat16"},
        },
        "workload": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 1},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "run", str(path), "-f", "json", "--results", str(tmp_path / "results")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "WORKBENCH_HOME": str(real_home), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert answer.returncode == 0, answer.stderr
    found = {(each["variant"], each["backend"]): each for each in json.loads(answer.stdout)}
    assert set(found) == {("base", engine) for engine in ("transformers", "vllm", "llamacpp")} | {
        ("gguf-Q4_0", "llamacpp")
    }
    for each in found.values():
        own = each["evaluations"]["story"]
        assert 1 < own["perplexity"] != each["perplexity"] and own["scored_tokens"] == 126
        assert own["bits_per_byte"] > 0 and own["kld_mean"] < own["kld_max"]
        assert each["tasks"]["everyday"]["items"] == 12
        # A 135M model knows what ice is; a third of the choices by chance.
        assert 0.5 <= each["tasks"]["everyday"]["accuracy"] <= 1
    four, base = found["gguf-Q4_0", "llamacpp"], found["base", "llamacpp"]
    assert four["evaluations"]["story"]["kld_mean"] > base["evaluations"]["story"]["kld_mean"] > 0
    assert four["tasks"]["everyday"]["accuracy_delta"] == pytest.approx(
        four["tasks"]["everyday"]["accuracy"] - base["tasks"]["everyday"]["accuracy"]
    )
    # In bfloat16 too, since the logits are not rounded; the reference is in float32 on a CPU.
    assert max(found["base", engine]["kld_mean"] for engine in ("transformers", "vllm")) < 2e-3
    references = real_home / "references"
    assert len(list(references.iterdir())) >= 2
    (rows_file,) = (tmp_path / "results").glob("*/rows.jsonl")
    for row in map(json.loads, rows_file.read_text().splitlines()):
        if row["backend"] != "llamacpp":
            assert row["measurement"]["settings"]["scored_logits"] == "float32"
        assert len(row["measurement"]["tasks"]["everyday"]["given"]) == 12
