"""A task's answers, generated and judged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from workbench.records import Answers, Task
from workbench.worker.measure.likelihoods import decoder_of, log_likelihoods
from workbench.worker.tokens.tasks import Item, TaskFile

SHOWN = 160
"""Characters of an answer that a row keeps."""


def answer(engine: Any, task: Task) -> Answers:
    """Put a task to an engine: `correct` (1 or 0 an item, in the order of its file), `given` (what was answered: the
    choice's index, or the text's beginning) and `warnings`.

    A choice whose log-probability is not finite is never taken; an item without any that is counts as wrong.
    A task of the harness: see `harness.run`.
    """
    path = Path(task.path)
    content: TaskFile = json.loads(path.read_text(encoding="utf-8"))
    if task.harness:
        from workbench.worker.measure import harness

        return harness.run(engine, content, path.with_name("tokenizer.json"))
    items = content["items"]
    given: list[Any] = [None] * len(items)
    spoken = [i for i, item in enumerate(items) if "windows" not in item]
    chosen = [i for i, item in enumerate(items) if "windows" in item]
    told = _said(engine, [items[i] for i in spoken], content["stop"], path.with_name("tokenizer.json"))
    for i, text in zip(spoken, told, strict=True):
        given[i] = cut(text, items[i]["stop"])
    lost = 0
    if chosen:
        asked = [(window, items[i]["first"]) for i in chosen for window in items[i]["windows"]]
        sums = iter(log_likelihoods(engine, asked, content["vocab_size"]))
        for i in chosen:
            scores = [next(sums) for _ in items[i]["windows"]]
            finite = [score for score, _ in scores if score is not None]
            lost += len(scores) - len(finite)
            given[i] = [score for score, _ in scores].index(max(finite)) if finite else None
    correct = [int(right(item, said)) for item, said in zip(items, given, strict=True)]
    shown = [said[:SHOWN] if isinstance(said, str) else said for said in given]
    warnings = [f"{lost} choices had NaN or infinite logits and were not taken"] if lost else []
    return {"correct": correct, "given": shown, "warnings": warnings}


def _said(engine: Any, items: list[Item], stop: list[int], spelling: Path) -> list[str]:
    """The text of each answer. A server makes a prompt of a chat's message itself, in its own template; all other
    prompts are the same ids for every engine, and so are answers but for a server's that tells text alone."""
    texts: dict[int, str] = {}
    if hasattr(engine, "chat"):
        chats = [i for i, item in enumerate(items) if "message" in item]
        asked = [items[i] for i in chats]
        messages = [item["message"] for item in asked]
        texts = dict(zip(chats, engine.chat(messages, [item["new_tokens"] for item in asked]), strict=True))
    rest = [i for i in range(len(items)) if i not in texts]
    if rest:
        prompts, most = [items[i]["prompt"] for i in rest], [items[i]["new_tokens"] for i in rest]
        if hasattr(engine, "say"):
            said = engine.say(prompts, most)
        else:
            decoder = decoder_of(spelling)
            said = [decoder.decode(ids, skip_special_tokens=True) for ids in engine.complete(prompts, most, stop)]
        texts |= dict(zip(rest, said, strict=True))
    return [texts[i] for i in range(len(items))]


def right(item: Item, said: Any) -> bool:
    """Whether what was answered is what the item expects."""
    if "choices" in item:
        return said is not None and item["choices"] == said
    if "exact" in item:
        return said.strip() in item["exact"]
    if "contains" in item:
        return any(word in said for word in item["contains"])
    return any(re.search(pattern, said) for pattern in item["regex"])


def cut(text: str, stop: list[str]) -> str:
    """The text up to the first of `stop` that has something before it."""
    begin = len(text) - len(text.lstrip())
    return text[: min([place for word in stop if (place := text.find(word, begin)) >= 0], default=len(text))]
