"""lm-evaluation-harness on a backend: its own prompts, ids and judgement, our scoring."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.records import Artifact, Job, Task, Workload, from_json
from workbench.worker.measure import answers, harness
from workbench.worker.tokens import tasks

ITEMS = [{"q": "The sky is", "c": ["blue", "green", "old"], "a": 0}, {"q": "Ice is", "c": ["hot", "cold"], "a": 1}]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{q}}"
metadata: {version: 1.0}
"""
CHOICES = """
task: workbench_choices
output_type: multiple_choice
doc_to_choice: "{{c}}"
doc_to_target: "{{a}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SPOKEN = """
task: workbench_spoken
output_type: generate_until
doc_to_target: "{{c[a]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def built(base: Path, folder: Path, name: str) -> Task:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    for own in (CHOICES, SPOKEN):
        file = folder / f"{own.split()[1]}.yaml"
        file.write_text(own + COMMON.replace("DATA", json.dumps(str(data))))
    payload = {"base": str(base), "tasks": {"t": {"lm_eval": name, "include": str(folder)}}, "out": str(folder)}
    made = tasks.build(payload, lambda *_: None)["tasks"]["t"]
    assert made["harness"] and made["items"] is None
    return from_json(Task, {**made, "path": str(folder / made["path"])})


def engine(base: Path, task: Task) -> Any:
    from workbench.worker.backends.transformers import Engine

    artifact = Artifact("base", "base", "safetensors", str(base), "0", 0, 0)
    options = {"device": "cpu"}
    return Engine(Job("Tiny", artifact, "transformers", options, Workload(repeats=0), tasks={"t": task}))


def test_without_it_the_command_is_told(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lm_eval", "lm_eval.evaluator"):  # the second may be imported already
        monkeypatch.setitem(sys.modules, module, None)
    task = built(tiny_llama, tmp_path, "workbench_choices")
    with pytest.raises(UserError, match=r"lm-evaluation-harness .* Install it with: pip install lm-eval"):
        answers.answer(None, task)


@pytest.mark.slow
def test_its_choices_are_those_of_its_own_model(tiny_llama: Path, tmp_path: Path) -> None:
    """The harness's class for transformers answers the same task with the same numbers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = built(tiny_llama, tmp_path, "workbench_choices")
    found = answers.answer(engine(tiny_llama, task), task)
    assert found["metric"] == "acc" and len(found["correct"]) == 2
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32"),
        tasks=["workbench_choices"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    samples = sorted(theirs["samples"]["workbench_choices"], key=lambda sample: sample["doc_id"])
    assert found["correct"] == [sample["acc"] for sample in samples]
    ours = harness.adapter(
        engine(tiny_llama, task), json.loads(Path(task.path).read_text()), tmp_path / "tokenizer.json"
    )
    for sample in samples:
        asked = [_request(*argument) for argument in sample["arguments"]]
        sums = [total for total, _ in ours.loglikelihood(asked)]
        assert sums == pytest.approx([float(reply[0]) for reply in sample["filtered_resps"]], abs=1e-4)


@pytest.mark.slow
def test_it_generates_and_knows_its_tasks(tiny_llama: Path, tmp_path: Path) -> None:
    task = built(tiny_llama, tmp_path, "workbench_spoken")
    own = engine(tiny_llama, task)
    found = answers.answer(own, task)
    assert found["metric"] == "exact_match" and found["correct"] == [0.0, 0.0] and len(found["given"]) == 2
    unknown = built(tiny_llama, tmp_path, "workbench_spken")
    with pytest.raises(UserError, match="knows no task of that name"):
        answers.answer(own, unknown)
    rolling = harness.adapter(
        own, json.loads(Path(task.path).read_text()) | {"longest": 16}, tmp_path / "tokenizer.json"
    )
    (short,), (long,) = (rolling.loglikelihood_rolling([_request(text)]) for text in ("ab", "ab" * 40))
    assert long < 10 * short < 0


class _request:
    def __init__(self, *arguments: str) -> None:
        self.args = arguments
