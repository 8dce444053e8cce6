"""Texts as people have them: what is text stays text, what is none is refused by a line that says where."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.home import stored
from workbench.records import TEXT_VERSION, Tasks, TokenSets
from workbench.worker.tokens import tasks
from workbench.worker.tokens.text import read_text, source_of
from workbench.worker.tokens.windows import build

PROSE = "It was a bright cold day in April, and the clocks were striking thirteen.\nWinston Smith slipped in. " * 8
SAID = "<s>" + PROSE[:150] + "</s><s> said <unk> the <0x41>"
"""With the names of special tokens in it."""


def of_file(folder: Path, name: str, content: str | bytes, **more: str) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_text(source_of({"file": str(folder / name), **more}))


def refusal(read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 300
    return text


def windows(base: Path, folder: Path, text: str, **more: Any) -> dict[str, Any]:
    """The token file of an evaluation of 8 windows of 16."""
    entry = {"role": "evaluation", "name": "e", "window": 16, "windows": 8, "score": "all", "out": str(folder / "e")}
    build({"base": str(base), "sets": [{**entry, "source": {"text": text}, **more}]}, lambda *_: None)
    found: dict[str, Any] = json.loads((folder / "e").read_text())
    return found


def spelt(base: Path, ids: list[int]) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(base).decode(ids))


# --- files --------------------------------------------------------------------------------------


def test_one_text_is_the_same_however_it_was_saved(tmp_path: Path) -> None:
    for name, content in (
        ("lf.txt", PROSE),
        ("crlf.txt", PROSE.replace("\n", "\r\n")),
        ("bom.txt", codecs.BOM_UTF8 + PROSE.encode()),
        ("bom-crlf.txt", codecs.BOM_UTF8 + PROSE.replace("\n", "\r\n").encode()),
        ("records.json", json.dumps([PROSE])),
        ("objects.json", json.dumps([{"text": PROSE}], indent=2)),
        ("records.jsonl", json.dumps({"text": PROSE}) + "\r\n"),
        ("strings.JSONL", json.dumps(PROSE) + "\n"),
    ):
        assert of_file(tmp_path, name, content) == PROSE, name
    assert of_file(tmp_path, "cr.txt", "a\rb\n") == "a\rb\n", "a carriage return alone is no end of a line"
    assert of_file(tmp_path, "said.jsonl", '{"text": "a\\r\\nb"}') == "a\r\nb", "what a string says is left"


def test_an_array_of_records_is_its_texts(tmp_path: Path) -> None:
    mixed = json.dumps(["one", {"text": "two", "body": "2"}])
    assert of_file(tmp_path, "a.json", mixed) == "one\n\ntwo"
    assert of_file(tmp_path, "a.json", '[{"body": "1"}, {"body": "2"}]', field="body") == "1\n\n2"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"text": "one"}', "not an array of records"),
        ("a.json", '"one"', "not an array of records"),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', "not valid JSON at line 2. For one record a line, name it"),
        ("a.json", "words", "not valid JSON"),
        ("a.json", '["one", {"txt": "two"}]', "record 2: field 'text' is missing. Did you mean 'txt'?"),
        ("a.json", '["one", ["two"]]', "record 2: field 'text' is missing"),
        ("a.json", "[]", "is empty"),
        ("a.json", '["one", {"text": "\\ud800"}]', "a.json holds \\ud800, half of a character"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "bad \\uD83D half"}\n', "line 3 holds \\ud83d, half of a character"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: field 'text' is missing"),
        ("a.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", "\n \n\t\n", "is empty"),
        ("a.txt", b"one\ntwo caf\xe9 au lait", "not UTF-8 text (byte 11) in line 2"),
        ("a.txt", "words".encode("utf-16"), "a binary file"),
        ("a.txt", b"one\0two", "a zero byte at 3"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    assert said in refusal(lambda: of_file(tmp_path, name, content))


def test_whole_characters_written_as_two_halves_are_read(tmp_path: Path) -> None:
    assert of_file(tmp_path, "a.jsonl", '{"text": "\\ud83e\\udd99"}') == "🦙"


def test_pipes_devices_and_folders_are_no_texts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.yaml").mkdir()
    for path, said in (
        (tmp_path / "pipe.txt", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path / "folder.yaml", "is a directory"),
        (tmp_path / "missing.txt", "does not exist. Check the path."),
        (tmp_path / "pipe.txt" / "a", "does not exist"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
    ):
        assert said in refusal(partial(read_text, source_of({"file": str(path)})))
        assert said in refusal(partial(tasks.read, path))
    said = refusal(lambda: read_text(source_of({"file": "~nobody-here/a.txt"})))
    assert said.startswith("~nobody-here/a.txt: nobody of that name")
    assert "has no file" in refusal(lambda: read_text(source_of({"package": "pytest", "file": "n" * 300})))


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "corpus_leaves.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "corpus_wrong.py").write_text("def\n")
    (tmp_path / "corpus_half.py").write_text("text = 'a \\ud800 b'\n")
    for name in (".relative", "..", "corpus_leaves", "corpus_wrong", "a/b", "n" * 300):
        assert "cannot be imported here" in refusal(partial(read_text, source_of({"module": name})))
    assert "half of a character" in refusal(lambda: read_text(source_of({"module": "corpus_half"})))


# --- what is spelt ------------------------------------------------------------------------------


def test_names_of_special_tokens_are_text(tiny_llama: Path, tmp_path: Path) -> None:
    found = windows(tiny_llama, tmp_path, SAID)
    ids = [token for window in found["windows"] for token in window]
    assert spelt(tiny_llama, ids) == SAID[: len(ids)] and not {0, 1, 2} & set(ids)


def test_the_conventions_own_token_stays(tiny_llama: Path, tmp_path: Path, make_tokenizer: Any) -> None:
    base = tmp_path / "bos"
    base.mkdir()
    (base / "config.json").write_text((tiny_llama / "config.json").read_text())
    make_tokenizer(base)
    stored = json.loads((base / "tokenizer.json").read_text())
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    stored["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
    (base / "tokenizer.json").write_text(json.dumps(stored))
    found = windows(base, tmp_path, SAID)
    assert found["bos"] == 1 and [window[0] for window in found["windows"]] == [1] * 8
    assert spelt(base, found["windows"][0][1:]) == SAID[1:16]


def test_ordinary_texts_have_the_ids_that_the_tokenizer_gives_them(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny_llama)(PROSE, add_special_tokens=False)["input_ids"]
    found = windows(tiny_llama, tmp_path, PROSE)
    assert [token for window in found["windows"] for token in window] == plain[: 8 * 16]
    assert found["digest"] == "4561e76ccd95bcb861d308c8fc6087e136ddd31d142d289972fcb612916d86b0"


def test_a_tokenizer_without_a_fast_form_spells_them_out_too(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    base = tmp_path / "bytes"
    ByT5Tokenizer().save_pretrained(base)
    (base / "config.json").write_text((tiny_llama / "config.json").read_text().replace("354", "400"))
    said = "</s><pad><extra_id_3>" + PROSE
    found = windows(base, tmp_path, said)
    assert [token for window in found["windows"] for token in window] == [b + 3 for b in said.encode()[: 8 * 16]]


def test_a_tokenizer_that_cannot_spell_one_out_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -9.0) for letter in sorted(set(SAID) | {"▁"}))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    base = tmp_path / "unigram"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(base)
    (base / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert windows(base, tmp_path, PROSE)
    said = refusal(lambda: windows(base, tmp_path, SAID))
    assert said == "the recipe's own text: this tokenizer takes '<s>' for a special token, not for text: leave it out"


def test_tokens_that_were_read_in_no_version_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    for kind, record, held in (("tokens", TokenSets, "sets"), ("tasks", Tasks, "tasks")):
        file = tmp_path / kind / "key" / f"{kind.rstrip('s')}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({held: {}, "text_version": TEXT_VERSION}))
        assert stored(kind, "key", record) is not None  # type: ignore[arg-type]
        file.write_text(json.dumps({held: {}}))
        assert stored(kind, "key", record) is None  # type: ignore[arg-type]


# --- tasks --------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}<s>model:"


def items(base: Path, folder: Path, *entries: dict[str, Any], name: str = "t.json", **more: Any) -> list[Any]:
    (folder / name).write_text(json.dumps(entries))
    payload = {"base": str(base), "tasks": {"t": {"file": str(folder / name), **more}}, "out": str(folder / "out")}
    (folder / "out").mkdir(exist_ok=True)
    made = tasks.build(payload, lambda *_: None)["tasks"]["t"]
    found: list[Any] = json.loads((folder / "out" / made["path"]).read_text())["items"]
    return found


def test_prompts_and_choices_are_text(tiny_llama: Path, tmp_path: Path) -> None:
    ask = {"prompt": "Is <s> one?</s>", "exact": "yes"}
    choose = {"prompt": "Which <s>?", "choices": ["</s>", "<s>"], "answer": 0}
    asked, chosen = items(tiny_llama, tmp_path, ask, choose)
    assert "message" not in asked
    assert spelt(tiny_llama, asked["prompt"]) == "Is <s> one?</s>" and not {1, 2} & set(asked["prompt"])
    assert [spelt(tiny_llama, ids) for ids in chosen["windows"]] == ["Which <s>? </s>", "Which <s>? <s>"]
    assert not {1, 2} & {token for ids in chosen["windows"] for token in ids}


def test_of_a_chat_the_templates_tokens_are_special_and_no_others(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHAT
    base = tmp_path / "chat"
    tokenizer.save_pretrained(base)
    (base / "config.json").write_text((tiny_llama / "config.json").read_text())
    plain, odd = items(
        base, tmp_path, {"prompt": " Hello ", "exact": "a"}, {"prompt": "</s><s>", "exact": "a"}, chat=True
    )
    whole = tokenizer("<s>user: Hello</s><s>model:", add_special_tokens=False)["input_ids"]
    assert plain["prompt"] == whole and plain["message"] == " Hello ", "a server has a template of its own"
    assert spelt(base, odd["prompt"]) == "<s>user: </s><s></s><s>model:"
    assert [token for token in odd["prompt"] if token in (1, 2)] == [1, 2, 1]
    (choice,) = items(base, tmp_path, {"prompt": "Hi", "choices": ["<s>", "b"], "answer": 1}, chat=True)
    assert [spelt(base, ids) for ids in choice["windows"]] == [
        "<s>user: Hi</s><s>model: <s>",
        "<s>user: Hi</s><s>model: b",
    ]
    assert [sum(token in (1, 2) for token in ids) for ids in choice["windows"]] == [3, 3]


GOOD = {"prompt": "a", "exact": "b"}


@pytest.mark.parametrize("name", ["tokenizer", "task"])
def test_a_task_may_be_called_as_what_lies_beside_it(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps([GOOD]))
    payload = {"base": str(tiny_llama), "tasks": {name: {"file": str(tmp_path / "t.json")}}, "out": str(tmp_path)}
    made = tasks.build(payload, lambda *_: None)["tasks"][name]
    assert "items" in json.loads((tmp_path / made["path"]).read_text())
    assert made["path"] != "task.json" and "model" in json.loads((tmp_path / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.jsonl", '{"prompt": "a \\ud800", "exact": "b"}\n', "line 1 holds \\ud800, half of a character"),
        ("t.yaml", '- {prompt: a, exact: b}\n- {prompt: a, exact: "\\uD800"}', "entry 2 holds \\ud800, half of a"),
        ("t.json", json.dumps([GOOD, {"prompt": "a"}]), "record 2: give exactly one of exact"),
        ("t.json", json.dumps(GOOD), "not an array of records"),
        ("t.json", json.dumps([{**GOOD, "id": 1}, GOOD, {**GOOD, "id": 1}]), "record 3: the id '1' is that of "),
        ("t.yaml", "- {prompt: a, exact: b, id: 2024-01-01}", "entry 1: `id` must be text or a whole number"),
        ("t.yaml", "[" * 50_000, "not valid YAML: nested too deeply"),
        ("t.yaml", "- {prompt: a, exact: b, id: 2024-99-99}", "not valid YAML: month must be in 1..12"),
        ("t.yaml", b"- {prompt: a, exact: caf\xe9}", "not UTF-8 text (byte 24) in line 1"),
        ("t.json", json.dumps([{**GOOD, "new_tokens": 10**9}]), "`new_tokens` must be a number from 1 to 1048576"),
        ("t.json", json.dumps([{"prompt": "a", "regex": "a{99999999999}"}]), "is not a regular expression"),
        ("t.json", json.dumps([{**GOOD, "k" * 5000: 1}]), "record 1: unknown key 'kkk"),
    ],
)
def test_bad_tasks_are_refused_with_their_place(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(lambda: tasks.read(tmp_path / name))


def test_ids_that_differ_are_no_twins(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps([{**GOOD, "id": 1}, {**GOOD, "id": "1"}, GOOD, GOOD]))
    assert [entry.id for entry in tasks.read(tmp_path / "t.json")] == [1, "1", None, None]
