"""Tasks: what a file may say, what its entries become, and what counts as right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench.errors import UserError
from workbench.records import Quality, Task, from_json
from workbench.worker.measure import answers, likelihoods
from workbench.worker.scoring.reducer import Scoring
from workbench.worker.tokens import tasks

EXAMPLE = ROOT / "recipes" / "tasks" / "everyday.yaml"


def built(base: Path, folder: Path, entries: list[Any], **more: Any) -> tuple[Task, dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mine.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    payload = {"base": str(base), "tasks": {"mine": {"file": str(file), **more}}, "out": str(folder)}
    made = tasks.build(payload, lambda *_: None)["tasks"]["mine"]
    path = folder / made["path"]
    return from_json(Task, {**made, "path": str(path)}), json.loads(path.read_text())


class Engine:
    """Answers as it is told, and takes the choice whose first letter comes last: real ids, no model.

    What a real engine says is in `tests/test_sets_and_tasks.py`.
    """

    def __init__(self, *answers: list[int], lost: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        self.answers, self.lost, self.prompts = answers, lost, []

    def complete(self, prompts: list[list[int]], new_tokens: list[int], stop: list[int]) -> list[list[int]]:
        self.prompts = prompts
        return [ids[:most] for ids, most in zip(self.answers, new_tokens, strict=True)]

    def score(self, asked: Scoring, progress: Any) -> Quality:
        import torch

        from workbench.worker.scoring.reducer import Reducer

        reducer = Reducer(asked)
        for index, ids, first in asked.windows:
            logits = torch.arange(354.0).repeat(len(ids) - first, 1) / 50
            if index in self.lost:
                logits[0, 0] = float("nan")
            reducer(index, first, logits)
        return reducer.result()


# --- the file -----------------------------------------------------------------------------------


def test_the_example_has_every_way_to_be_right() -> None:
    entries = tasks.read(EXAMPLE)
    assert {entry.way for entry in entries} == set(tasks.WAYS)
    assert len(entries) >= 10


BAD: dict[str, tuple[Any, str]] = {
    "no-mapping": ("What?", "line 1: a mapping with a `prompt` and one of exact, contains, regex, choices"),
    "key": ({"promt": "a", "exact": "b"}, "unknown key 'promt'. Did you mean 'prompt'?"),
    "no-prompt": ({"exact": "b"}, "`prompt` must be text"),
    "empty-prompt": ({"prompt": "", "exact": "b"}, "`prompt` must be text"),
    "nothing": ({"prompt": "a"}, "give exactly one of exact, contains, regex, choices (found none)"),
    "two": ({"prompt": "a", "exact": "b", "regex": "c"}, "(found exact and regex)"),
    "number": ({"prompt": "2 + 2 =", "exact": 4}, "put numbers and yes or no in quotes"),
    "empty": ({"prompt": "a", "contains": []}, "`contains` must be text, or a list of texts"),
    "regex": ({"prompt": "a", "regex": "(b"}, "`regex` '(b' is not a regular expression: missing )"),
    "one-choice": ({"prompt": "a", "choices": ["b"], "answer": 0}, "two or more different texts"),
    "same-choice": ({"prompt": "a", "choices": ["b", "b"], "answer": 0}, "two or more different texts"),
    "no-answer": ({"prompt": "a", "choices": ["b", "c"]}, "must be one of the choices, or its number from 0 to 1"),
    "far-answer": ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "its number from 0 to 1"),
    "true-answer": ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "its number from 0 to 1"),
    "lone-answer": ({"prompt": "a", "exact": "b", "answer": "b"}, "`answer` belongs to `choices`"),
    "stop": ({"prompt": "a", "exact": "b", "stop": 3}, "`stop` must be text"),
    "new-tokens": ({"prompt": "a", "exact": "b", "new_tokens": 0}, "`new_tokens` must be a number from 1"),
}


@pytest.mark.parametrize("entry", BAD)
def test_bad_entries_are_refused_with_their_place(entry: str, tiny_llama: Path, tmp_path: Path) -> None:
    content, message = BAD[entry]
    with pytest.raises(UserError, match="mine.jsonl: line 1: ") as caught:
        built(tiny_llama, tmp_path, [content])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    def refusal(name: str, text: str | None) -> str:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as caught:
            tasks.read(tmp_path / name)
        return str(caught.value)

    assert "is not valid JSON" in refusal("a.jsonl", '{"prompt": \n')
    assert "not valid YAML" in refusal("b.yaml", "- {prompt: [")
    assert "a list of entries" in refusal("c.yaml", "prompt: a\nexact: b\n")
    assert "is empty: there is nothing to ask" in refusal("d.jsonl", "\n")
    assert "does not exist. Did you mean 'd.jsonl'?" in refusal("dd.jsonl", None)
    assert "not valid YAML" in refusal("e.yaml", "- !!python/object/apply:os.system [echo no]\n")


@pytest.mark.parametrize("form", ["nested", "n_positions"])
def test_the_context_is_found_wherever_a_configuration_says_it(tiny_llama: Path, tmp_path: Path, form: str) -> None:
    """Gemma's is inside `text_config`, older models have another word: their tasks were never compared with it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text())
    most = config.pop("max_position_embeddings")
    config = {"text_config": config | {"max_position_embeddings": most}} if form == "nested" else config | {form: most}
    if form == "nested":
        config["model_type"] = config["text_config"]["model_type"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="tokens with its answer, and the model takes 2048"):
        built(base, tmp_path, [{"prompt": "word " * 3000, "exact": "a"}])


def test_a_prompt_longer_than_the_model_takes_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2: 3\d\d\d tokens with its answer, and the model takes 2048"):
        built(tiny_llama, tmp_path, [{"prompt": "a", "exact": "b"}, {"prompt": "a " * 1600, "exact": "b"}])


# --- what it becomes ----------------------------------------------------------------------------


def test_choices_stand_behind_the_same_ids(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    task, content = built(tiny_llama, tmp_path, [{"prompt": "Ice is", "choices": ["cold", "hot"], "answer": "hot"}])
    (item,) = content["items"]
    decode = AutoTokenizer.from_pretrained(tiny_llama).decode
    assert [decode(ids) for ids in item["windows"]] == ["Ice is cold", "Ice is hot"]
    # The last shared id is the one whose prediction is scored first.
    assert [decode(ids[item["first"] + 1 :]) for ids in item["windows"]] == [" cold", " hot"]
    assert item["choices"] == 1
    assert task.items == 1 and task.longest == len("Ice is cold") and not task.harness


def test_a_blank_of_ones_own_is_not_doubled_and_limits_hold(tiny_llama: Path, tmp_path: Path) -> None:
    entries = [
        {"prompt": "a: ", "choices": ["b", "c"], "answer": 0},
        {"prompt": "a:", "choices": ["\nb", "\nc"], "answer": 0},
        {"prompt": "left out", "exact": "b"},
    ]
    task, content = built(tiny_llama, tmp_path, entries, limit=2)
    assert [len(item["windows"][0]) for item in content["items"]] == [4, 4] and task.items == 2


def test_the_digest_follows_what_is_asked(tiny_llama: Path, tmp_path: Path) -> None:
    entry = {"prompt": "a", "exact": "b"}
    first, _ = built(tiny_llama, tmp_path / "1", [entry])
    assert built(tiny_llama, tmp_path / "2", [entry])[0].digest == first.digest
    assert built(tiny_llama, tmp_path / "3", [{**entry, "exact": "c"}])[0].digest != first.digest
    assert built(tiny_llama, tmp_path / "4", [entry], new_tokens=9)[0].digest != first.digest


# --- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "said", "expected"),
    [
        ({"exact": ["Paris"]}, " Paris ", True),
        ({"exact": ["Paris"]}, "Paris, of course", False),
        ({"exact": ["chat", "le chat"]}, "le chat", True),
        ({"contains": ["Paris"]}, "It is Paris.", True),
        ({"contains": ["Paris"]}, "paris", False),
        ({"regex": [r"^\s*5\b"]}, " 5, 6", True),
        ({"regex": [r"^\s*5\b"]}, " 55", False),
        ({"choices": 0}, 0, True),
        ({"choices": 0}, 1, False),
        ({"choices": 0}, None, False),
    ],
)
def test_what_counts_as_right(item: dict[str, Any], said: Any, expected: bool) -> None:
    assert answers.right(item, said) is expected


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("\n Paris\nLyon", ["\n"], "\n Paris"), ("Paris", ["\n"], "Paris"), ("a. b; c", [";", "."], "a"), ("a", [], "a")],
)
def test_an_answer_ends_where_it_should(text: str, stop: list[str], expected: str) -> None:
    assert answers.cut(text, stop) == expected


def test_items_are_answered_in_the_order_of_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    entries = [
        {"prompt": "one", "contains": "x"},
        {"prompt": "two", "choices": ["a", "z"], "answer": "z"},
        {"prompt": "three", "exact": "yes", "new_tokens": 4},
        {"prompt": "four", "choices": ["z", "a"], "answer": "a"},
    ]
    task, content = built(tiny_llama, tmp_path, entries)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    said = [tokenizer("a box", add_special_tokens=False)["input_ids"], tokenizer("yes\n!")["input_ids"]]
    engine = Engine(*said)
    found = answers.answer(engine, task)
    assert found == {"correct": [1, 1, 1, 0], "given": ["a box", 1, "yes", 0], "warnings": []}
    assert [tokenizer.decode(ids) for ids in engine.prompts] == ["one", "three"]


def test_a_choice_with_a_broken_logit_is_never_taken(tiny_llama: Path, tmp_path: Path) -> None:
    entry = {"prompt": "two", "choices": ["a", "z"], "answer": "z"}
    task, _ = built(tiny_llama, tmp_path, [entry, {**entry, "prompt": "three"}])
    found = answers.answer(Engine(lost={1, 2, 3}), task)
    assert found["given"] == [0, None] and found["correct"] == [0, 0]
    assert found["warnings"] == ["3 choices had NaN or infinite logits and were not taken"]


def test_log_likelihoods_are_those_of_the_formula(tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    logs = torch.log_softmax(torch.arange(354.0, dtype=torch.float64) / 50, -1)
    asked = [([5, 6, 7, 353], 1), ([5, 353, 353], 0), ([5, 6, 7, 353], 1)]
    found = likelihoods.log_likelihoods(Engine(), asked, 354)
    assert found[0][0] == pytest.approx(float(logs[7] + logs[353]), rel=1e-6) and found[0][1] is False
    assert found[1][0] == pytest.approx(float(2 * logs[353]), rel=1e-6) and found[1][1] is True
    assert found[2] == found[0]
