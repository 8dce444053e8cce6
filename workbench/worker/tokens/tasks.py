"""Tasks: prompts with expected answers, the fifty to a hundred examples of one's own that decide in practice.

A task's file is YAML (a list) or JSONL, each entry a `prompt` and exactly one way to be right:

    exact: Paris             the whole answer, but for white space around it
    contains: [Paris]        somewhere in the answer
    regex: "^ *4\\b"          found in the answer (Python's `re`)
    choices: [red, blue]     of which the right one, `answer`, must be the likeliest continuation

`exact`, `contains` and `regex` also take a list, of which one is enough. An answer is the likeliest continuation, token
by token, cut at the first of `stop` (default: the end of the line for `exact`, nothing otherwise) and at `new_tokens`.
Choices are compared by the sum of their tokens' log-probabilities behind the same ids, as the ARC and MMLU tasks of
lm-evaluation-harness do it without normalisation; a blank joins prompt and choice unless one of them has one there.

Everything becomes token ids once a recipe (`build`), so that all engines are asked the same, and an engine's worker
needs no more of a tokenizer than its decoder (`answer`). Rows keep what was right item by item, so that a variant's
difference to the base is paired. Tasks of the harness itself are run by it, through `harness.py`.

Rejected: sampling (another seed, another accuracy), and answers judged by a model (another model's opinion).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from workbench.errors import UserError, did_you_mean
from workbench.worker import Progress

WAYS = ("exact", "contains", "regex", "choices")
KEYS = ("id", "prompt", *WAYS, "answer", "stop", "new_tokens")
NEW_TOKENS = 32
HARNESS_LONGEST = 4096
"""Tokens that an engine is made ready for where only the harness knows its prompts; longer ones lose their start."""


def build(payload: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Worker: `base` (a Hugging Face directory), `tasks` (name -> `file`, `limit`, `new_tokens`, `chat`, or `lm_eval`,
    `include`, `limit`, `shots`), `out` (a folder), `allow_remote_code`.

    Writes `NAME.json` for each and the tokenizer beside them. Returns `{"tasks": {name: Task}}` with paths
    relative to `out`. Raises `UserError` for what is wrong with a file, with the entry's place.
    """
    from workbench.worker.tokens.windows import open_tokenizer

    base, out = Path(payload["base"]), Path(payload["out"])
    tokenizer, vocab_size, bos = open_tokenizer(base, bool(payload.get("allow_remote_code")))
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{base}: tasks need a tokenizer of the `tokenizers` library, and this base has none")
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    room = json.loads((base / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    common = {"vocab_size": vocab_size, "bos": bos, "stop": ends}
    made = {}
    for done, (name, task) in enumerate(payload["tasks"].items()):
        progress(done, len(payload["tasks"]), f"task {name}")
        if "lm_eval" in task:
            longest = min(HARNESS_LONGEST, room or HARNESS_LONGEST)
            content: dict[str, Any] = common | {"harness": task, "longest": longest}
        else:
            entries = read(Path(task["file"]))[: task.get("limit")]
            items = [_item(entry, where, task, tokenizer, bos) for where, entry in entries]
            longest = max(map(_length, items))
            for (where, _), item in zip(entries, items, strict=True):
                if room and _length(item) > room:
                    raise UserError(f"{where}: {_length(item)} tokens with its answer, and the model takes {room}")
            content = common | {"items": items, "longest": longest}
        text = json.dumps(content, separators=(",", ":"))
        (out / f"{name}.json").write_text(text, encoding="utf-8")
        made[name] = {
            "name": name,
            "path": f"{name}.json",
            "digest": hashlib.sha256(text.encode()).hexdigest()[:16],
            "items": len(content["items"]) if "items" in content else None,
            "longest": content["longest"],
            "harness": "harness" in content,
        }
    progress(1, 1, "tasks written")
    return {"tasks": made}


def read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a task's file, each with its place for messages. Raises `UserError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"task file {path} does not exist. {did_you_mean(path.name, near)}".rstrip()) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task file {path} cannot be read as text: {error}") from None
    if path.suffix in (".jsonl", ".ndjson"):
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    entries.append((f"{path}: line {number}", json.loads(line)))
                except (ValueError, RecursionError):
                    raise UserError(f"{path}: line {number} is not valid JSON. Each line must be one object.") from None
    else:
        import yaml

        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(data, list):
            raise UserError(f"{path}: a list of entries, each with a `prompt` and an expected answer")
        entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(data, 1)]
    if not entries:
        raise UserError(f"{path} is empty: there is nothing to ask")
    for where, entry in entries:
        _check(entry, where)
    return entries


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a mapping with a `prompt` and one of {', '.join(WAYS)}")
    for key in entry:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{key}'. {did_you_mean(str(key), KEYS)}")
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise UserError(f"{where}: `prompt` must be text")
    given = [way for way in WAYS if way in entry]
    if len(given) != 1:
        raise UserError(f"{where}: give exactly one of {', '.join(WAYS)} (found {' and '.join(given) or 'none'})")
    (way,) = given
    texts = entry[way] if isinstance(entry[way], list) else [entry[way]]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        # YAML reads 4 as a number and `no` as false, neither of which a model can say.
        raise UserError(f"{where}: `{way}` must be text, or a list of texts; put numbers and yes or no in quotes")
    if way == "choices":
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UserError(f"{where}: `choices` must be two or more different texts")
        right_one = entry.get("answer")
        if right_one not in texts and not (type(right_one) is int and 0 <= right_one < len(texts)):
            raise UserError(f"{where}: `answer` must be one of the choices, or its number from 0 to {len(texts) - 1}")
    elif "answer" in entry:
        raise UserError(f"{where}: `answer` belongs to `choices`; here `{way}` is what is expected")
    if way == "regex":
        for pattern in texts:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: `regex` {pattern!r} is not a regular expression: {error}") from None
    stop = entry.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise UserError(f"{where}: `stop` must be text, or a list of texts")
    most = entry.get("new_tokens", 1)
    if type(most) is not int or most < 1:
        raise UserError(f"{where}: `new_tokens` must be a number from 1")


def _item(entry: dict[str, Any], where: str, task: dict[str, Any], tokenizer: Any, bos: int | None) -> dict[str, Any]:
    prompt = entry["prompt"]
    if task.get("chat"):
        if not tokenizer.chat_template:
            raise UserError(f"{where}: `chat` needs a chat template, and the base has none")
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def ids_of(text: str) -> list[int]:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        # A chat template may say it itself.
        return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids

    name = entry.get("id")
    if "choices" in entry:
        texts = entry["choices"]
        windows = []
        for choice in texts:
            apart = prompt[-1:].isspace() or choice[:1].isspace()
            windows.append(ids_of(prompt + choice if apart else f"{prompt} {choice}"))
        start = ids_of(prompt)
        # All choices behind the same ids, as many as they share with the prompt alone.
        shared = min(_shared(start, window) for window in windows)
        if not 0 < shared < min(map(len, windows)):
            raise UserError(f"{where}: prompt and choices cannot be told apart in tokens; make the prompt longer")
        answer = entry["answer"]
        place = texts.index(answer) if answer in texts else answer
        return {"id": name, "windows": windows, "first": shared - 1, "choices": place}
    way = next(way for way in WAYS if way in entry)
    expected = entry[way] if isinstance(entry[way], list) else [entry[way]]
    if way == "exact":
        expected = [text.strip() for text in expected]
    stop = entry.get("stop", ["\n"] if way == "exact" else [])
    return {
        "id": name,
        "prompt": ids_of(prompt),
        way: expected,
        "stop": [stop] if isinstance(stop, str) else stop,
        "new_tokens": entry.get("new_tokens") or task.get("new_tokens") or NEW_TOKENS,
    }


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _length(item: dict[str, Any]) -> int:
    return max(map(len, item["windows"])) if "windows" in item else len(item["prompt"]) + int(item["new_tokens"])
