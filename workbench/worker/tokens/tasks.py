"""Tasks: prompts with expected answers, the fifty to a hundred examples of one's own that decide in practice.

A task's file is YAML or JSON (a list) or JSONL, each entry a `prompt` and exactly one way to be right:

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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

from workbench.errors import UserError, did_you_mean, short
from workbench.records import TEXT_VERSION, Task, Tasks, TasksRequest, from_json, to_json
from workbench.worker import Progress
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import context_tokens
from workbench.worker.tokens.text import check_characters, is_records, read_file, records
from workbench.worker.tokens.windows import encode, open_tokenizer, special_tokens

Way = Literal["exact", "contains", "regex", "choices"]
WAYS: tuple[Way, ...] = get_args(Way)
KEYS = ("id", "prompt", *WAYS, "answer", "stop", "new_tokens")
NEW_TOKENS = 32
MOST_NEW_TOKENS = 2**20
PLACE = "<<the message>>"
"""Where a chat template puts a message."""
MAX_DEPTH = 32
"""Of a YAML file; the parser's time grows with its square."""
HARNESS_LONGEST = 4096
"""Tokens that an engine is made ready for where only the harness knows its prompts; longer ones lose their start."""


@dataclass(frozen=True)
class Entry:
    """One entry of a task's file, checked."""

    where: str
    """Its place, for messages."""
    id: int | str | None
    prompt: str
    way: Way
    texts: list[str]
    """What is expected, or the choices."""
    right: int
    """The right choice."""
    stop: list[str]
    new_tokens: int | None


class Item(TypedDict, total=False):
    """An entry in token ids: `windows`, `first` and `choices`, or the other keys with one of the ways."""

    id: object
    windows: list[list[int]]
    """Prompt and choice, a window a choice."""
    first: int
    """The last position before the choices."""
    choices: int
    """The right one."""
    prompt: list[int]
    message: str
    """What is said in a chat, for servers, which have a template of their own."""
    exact: list[str]
    contains: list[str]
    regex: list[str]
    stop: list[str]
    new_tokens: int


class TaskFile(TypedDict, total=False):
    """What is written for a task: `items`, or what the `harness` is asked for."""

    vocab_size: int
    bos: int | None
    stop: list[int]
    """Ids that end an answer."""
    longest: int
    """Tokens of the longest prompt with its answer."""
    items: list[Item]
    harness: dict[str, Any]


def build(payload: object, progress: Progress) -> object:
    """Worker for a `TasksRequest`: write `task-NAME.json` for each task, and the tokenizer beside them.

    Returns `Tasks`. Raises `UserError` for what is wrong with a file, with the entry's place.
    """
    request: TasksRequest = from_json(TasksRequest, payload)
    base, out = Path(request.base), Path(request.out)
    tokenizer, vocab_size, bos = open_tokenizer(base, request.allow_remote_code)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{base}: tasks need a tokenizer of the `tokenizers` library, and this base has none")
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    room = context_tokens(read_json(base / "config.json"))
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    made = {}
    for done, (name, task) in enumerate(request.tasks.items()):
        progress(done, len(request.tasks), f"task {name}")
        content: TaskFile = {"vocab_size": vocab_size, "bos": bos, "stop": ends}
        if "lm_eval" in task:
            content["harness"], content["longest"] = task, min(HARNESS_LONGEST, room or HARNESS_LONGEST)
        else:
            entries = read(Path(task["file"]))[: task.get("limit")]
            content["items"] = [_item(entry, task, tokenizer, bos) for entry in entries]
            lengths = [_length(item) for item in content["items"]]
            content["longest"] = max(lengths)
            for entry, length in zip(entries, lengths, strict=True):
                if room and length > room:
                    raise UserError(f"{entry.where}: {length} tokens with its answer, and the model takes {room}")
        text = json.dumps(content, separators=(",", ":"))
        # A task may be called as what else lies there.
        file = f"task-{name}.json"
        (out / file).write_text(text, encoding="utf-8")
        made[name] = Task(
            name,
            file,
            hashlib.sha256(text.encode()).hexdigest()[:16],
            len(content["items"]) if "items" in content else None,
            content["longest"],
            "harness" in content,
        )
    progress(1, 1, "tasks written")
    return to_json(Tasks(made, TEXT_VERSION))


def read(path: Path) -> list[Entry]:
    """The entries of a task's file. Raises `UserError` with the place of what is wrong."""
    text = read_file(path, "task file")
    if is_records(path):
        found = list(records(path, text))
    else:
        import yaml

        try:
            depth = 0
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    raise yaml.YAMLError("nested too deeply")
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise UserError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
        if not isinstance(data, list):
            raise UserError(f"{path}: a list of entries, each with a `prompt` and an expected answer")
        found = [(f"{path}: entry {number}", entry) for number, entry in enumerate(data, 1)]
    if not found:
        raise UserError(f"{path} is empty: there is nothing to ask")
    entries = [_entry(given, where) for where, given in found]
    names = {entry.id: entry.where for entry in reversed(entries)}
    for entry in entries:
        if entry.id is not None and names[entry.id] != entry.where:
            raise UserError(f"{entry.where}: the id '{short(entry.id)}' is that of {names[entry.id]} too")
    return entries


def _entry(given: Any, where: str) -> Entry:
    """An entry as it was written. Raises `UserError` for what is wrong with it."""
    if not isinstance(given, dict):
        raise UserError(f"{where}: a mapping with a `prompt` and one of {', '.join(WAYS)}")
    for key in given:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key '{short(key)}'. {did_you_mean(str(key), KEYS)}")
    if not isinstance(given.get("prompt"), str) or not given["prompt"]:
        raise UserError(f"{where}: `prompt` must be text")
    ways = [way for way in WAYS if way in given]
    if len(ways) != 1:
        raise UserError(f"{where}: give exactly one of {', '.join(WAYS)} (found {' and '.join(ways) or 'none'})")
    (way,) = ways
    texts = given[way] if isinstance(given[way], list) else [given[way]]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        # YAML reads 4 as a number and `no` as false, neither of which a model can say.
        raise UserError(f"{where}: `{way}` must be text, or a list of texts; put numbers and yes or no in quotes")
    right = given.get("answer")
    if way == "choices":
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise UserError(f"{where}: `choices` must be two or more different texts")
        if right not in texts and not (type(right) is int and 0 <= right < len(texts)):
            raise UserError(f"{where}: `answer` must be one of the choices, or its number from 0 to {len(texts) - 1}")
    elif "answer" in given:
        raise UserError(f"{where}: `answer` belongs to `choices`; here `{way}` is what is expected")
    if way == "regex":
        for pattern in texts:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{where}: `regex` '{short(pattern)}' is not a regular expression: {error}") from None
    stop = given.get("stop", ["\n"] if way == "exact" else [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise UserError(f"{where}: `stop` must be text, or a list of texts")
    most = given.get("new_tokens", 1)
    if type(most) is not int or not 1 <= most <= MOST_NEW_TOKENS:
        raise UserError(f"{where}: `new_tokens` must be a number from 1 to {MOST_NEW_TOKENS}")
    name = given.get("id")
    if name is not None and type(name) not in (int, str):
        raise UserError(f"{where}: `id` must be text or a whole number")
    check_characters("".join([given["prompt"], *texts, *stop, str(name)]), where)
    number = texts.index(right) if right in texts else right or 0
    return Entry(where, name, given["prompt"], way, texts, number, stop, given.get("new_tokens"))


def _item(entry: Entry, task: Mapping[str, Any], tokenizer: Any, bos: int | None) -> Item:
    prompt, chat = entry.prompt, bool(task.get("chat"))
    if chat and not tokenizer.chat_template:
        raise UserError(f"{entry.where}: `chat` needs a chat template, and the base has none")

    def in_chat(said: str) -> str:
        message = [{"role": "user", "content": said}]
        return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))

    def ids_of(rest: str = "") -> list[int]:
        """Of the prompt, in its template if it has one, and what follows it."""
        ids: list[int] = []
        if not chat:
            ids = encode(tokenizer, prompt + rest, entry.where)["input_ids"]
        elif not any(word in prompt + rest for word in special_tokens(tokenizer)):
            ids = tokenizer(in_chat(prompt) + rest, add_special_tokens=False)["input_ids"]
        else:
            # The template's special tokens are meant, those that people wrote are text.
            before, _, after = in_chat(PLACE).partition(PLACE)
            for template, said in ((before, prompt), (after, rest)):
                ids += tokenizer(template, add_special_tokens=False)["input_ids"]
                ids += encode(tokenizer, said, entry.where)["input_ids"]
        # A chat template may say it itself.
        return [bos, *ids] if bos is not None and ids[:1] != [bos] else list(ids)

    if entry.way == "choices":
        open_end = not (in_chat(prompt) if chat else prompt)[-1:].isspace()
        windows = [ids_of(" " * (open_end and not choice[:1].isspace()) + choice) for choice in entry.texts]
        start = ids_of()
        # All choices behind the same ids, as many as they share with the prompt alone.
        shared = min(_shared(start, window) for window in windows)
        if not 0 < shared < min(map(len, windows)):
            raise UserError(f"{entry.where}: prompt and choices cannot be told apart in tokens; make the prompt longer")
        return {"id": entry.id, "windows": windows, "first": shared - 1, "choices": entry.right}
    item: Item = {"id": entry.id, "prompt": ids_of()}
    if chat:
        item["message"] = prompt
    item[entry.way] = [text.strip() for text in entry.texts] if entry.way == "exact" else entry.texts
    item["stop"], item["new_tokens"] = entry.stop, entry.new_tokens or task.get("new_tokens") or NEW_TOKENS
    return item


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _length(item: Item) -> int:
    return max(map(len, item["windows"])) if "windows" in item else len(item["prompt"]) + int(item["new_tokens"])
