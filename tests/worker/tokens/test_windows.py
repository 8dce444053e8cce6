"""Text to token windows: what is scored, what never overlaps, and every bad text."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from workbench.errors import UserError
from workbench.worker.tokens.text import read_text, source_of
from workbench.worker.tokens.windows import build

EVALUATION = {"role": "evaluation", "name": "test", "window": 16, "windows": 4, "score": "second-half"}
CALIBRATION = {"role": "calibration", "name": "look", "window": 40, "windows": 5, "score": "all", "seed": 0}


def silent(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total and text


def make_base(path: Path, bos: bool, vocab_size: int = 300) -> Path:
    """A directory with a byte-level tokenizer (one token a byte) and a config; windows.py needs no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), bos=False)


def prose(characters: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters + " ", k=characters))


def run(base: Path, tmp_path: Path, *sets: dict[str, Any], **more: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each set's reply and the file it names."""
    asked = [{**entry, "out": str(tmp_path / f"{number}.json")} for number, entry in enumerate(sets)]
    replies = build({"base": str(base), "sets": asked, **more}, silent)["sets"]
    return [(reply, json.loads(Path(reply["path"]).read_text())) for reply in replies]


def refusal(base: Path, tmp_path: Path, *sets: dict[str, Any], **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(base, tmp_path, *sets, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tokens(base: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(base))(text, add_special_tokens=False)["input_ids"]


# --- windows and what is scored -----------------------------------------------------------------


def test_windows_are_consecutive_and_start_with_the_text(base: Path, tmp_path: Path) -> None:
    text = prose(200)
    ids = tokens(base, text)
    [(reply, file)] = run(base, tmp_path, {**EVALUATION, "source": {"text": text}})
    assert file["windows"] == [ids[16 * i : 16 + 16 * i] for i in range(4)]
    assert file["score_from"] == [8] * 4 and file["vocab_size"] == 300 and file["bos"] is None
    assert file["digest"] == reply["digest"]
    # Positions 8..14 predict tokens 9..15; one byte a token here.
    assert reply["scored_tokens"] == reply["scored_bytes"] == 4 * 7
    assert (reply["window"], reply["windows"], reply["score"]) == (16, 4, "second-half")


def test_all_windows_that_fit(base: Path, tmp_path: Path) -> None:
    [(reply, file)] = run(
        base, tmp_path, {**EVALUATION, "source": {"text": prose(100)}, "windows": None, "score": "all"}
    )
    assert len(file["windows"]) == 6 and file["score_from"] == [0] * 6 and reply["scored_tokens"] == 6 * 15


def test_strided_windows_score_every_token_once(base: Path, tmp_path: Path) -> None:
    text = prose(100)
    entry = {**EVALUATION, "source": {"text": text}, "windows": None, "score": "strided", "stride": 5}
    [(reply, file)] = run(base, tmp_path, entry)
    scored: list[int] = []
    for number, first in enumerate(file["score_from"]):
        scored += [5 * number + position + 1 for position in range(first, 15)]
    assert scored == list(range(1, scored[-1] + 1)) and scored[-1] >= 95
    assert reply["scored_tokens"] == len(scored)
    assert "needs a `stride`" in refusal(base, tmp_path, {**entry, "stride": None})
    assert "needs a `stride`" in refusal(base, tmp_path, {**entry, "stride": 16})


def test_scored_bytes_count_characters_of_several_bytes(base: Path, tmp_path: Path) -> None:
    # Windows of 4 characters of 4 bytes, "all": bytes 1..15 of each are predicted; the first one's character counts.
    [(reply, _)] = run(base, tmp_path, {**EVALUATION, "source": {"text": "🦙" * 8}, "windows": 2, "score": "all"})
    assert reply["scored_bytes"] == 32


def test_bos_takes_the_first_place_only_if_the_tokenizer_adds_it(base: Path, tmp_path: Path) -> None:
    text = prose(100)
    with_bos = make_base(tmp_path / "bos", bos=True)
    [(reply, file)] = run(with_bos, tmp_path, {**EVALUATION, "source": {"text": text}})
    ids = tokens(base, text)
    assert file["bos"] == 0
    assert file["windows"] == [[0, *ids[16 * i + 1 : 16 * i + 16]] for i in range(4)]
    [(plain, _)] = run(base, tmp_path, {**EVALUATION, "source": {"text": text}})
    assert plain["digest"] != reply["digest"]


def test_digest_follows_ids_and_convention_only(base: Path, tmp_path: Path) -> None:
    text = prose(100)
    entry = {**EVALUATION, "source": {"text": text}}
    (tmp_path / "same.txt").write_text(text)
    changes = [{}, {"name": "x"}, {"source": {"file": str(tmp_path / "same.txt")}}, {"score": "all"}, {"windows": 3}]
    digests = [run(base, tmp_path, {**entry, **change})[0][0]["digest"] for change in changes]
    assert len(set(digests[:3])) == 1 and len(set(digests)) == 3


# --- calibration and evaluation -----------------------------------------------------------------


def test_calibration_takes_what_evaluation_leaves(base: Path, tmp_path: Path) -> None:
    text = prose(600)
    source = {"text": text}
    evaluation = {**EVALUATION, "source": source, "windows": 20}
    for seed in range(5):
        (_, test), (_, look) = run(base, tmp_path, evaluation, {**CALIBRATION, "source": source, "seed": seed})
        ids = tokens(base, text)
        places = [next(i for i in range(600) if ids[i : i + 40] == w) for w in look["windows"]]
        assert all(a >= 320 for a in places), places
        assert all(b - a >= 40 for a, b in zip(sorted(places), sorted(places)[1:], strict=False))
        assert len(test["windows"]) == 20


def test_calibration_is_seeded_and_order_of_sets_is_free(base: Path, tmp_path: Path) -> None:
    source = {"text": prose(2000)}
    look = {**CALIBRATION, "source": source}
    test = {**EVALUATION, "source": source}
    (first, _), (second, _) = run(base, tmp_path, look, test)
    assert (first["name"], second["name"]) == ("look", "test")
    (_, _), (again, _) = run(base, tmp_path, test, look)
    [_, (other, _)] = run(base, tmp_path, test, {**look, "seed": 1})
    assert first["digest"] == again["digest"] != other["digest"]


def test_calibration_that_repeats_the_evaluation_is_refused(base: Path, tmp_path: Path) -> None:
    test = prose(200)
    source = {"text": prose(100, 1) + test[10:60] + prose(100, 2) + test[100:150] + prose(20, 3)}
    sets = (
        {**EVALUATION, "source": {"text": test}, "windows": 12},
        {**CALIBRATION, "source": source, "windows": 3, "window": 100},
    )
    said = refusal(base, tmp_path, *sets)
    assert "'look' shares 2 passages of 32 tokens or more" in said and "allow_overlap: true" in said
    assert run(base, tmp_path, *sets, allow_overlap=True)


def test_short_coincidences_are_no_overlap(base: Path, tmp_path: Path) -> None:
    test = prose(200)
    source = {"text": prose(100, 1) + test[10:41] + prose(300, 2)}
    assert run(
        base, tmp_path, {**EVALUATION, "source": {"text": test}, "windows": 12}, {**CALIBRATION, "source": source}
    )


def test_repeated_passages_of_a_shared_text_are_passed_over(base: Path, tmp_path: Path) -> None:
    repeated = prose(40)
    text = repeated + prose(24, 1) + repeated * 2 + prose(216, 2)
    (_, test), (_, look) = run(
        base, tmp_path, {**EVALUATION, "source": {"text": text}}, {**CALIBRATION, "source": {"text": text}}
    )
    assert tokens(base, repeated) not in look["windows"] and len(look["windows"]) == 5


def test_too_little_left_for_calibration(base: Path, tmp_path: Path) -> None:
    source = {"text": prose(200)}
    said = refusal(base, tmp_path, {**EVALUATION, "source": source}, {**CALIBRATION, "source": source})
    assert "200 tokens and 3 windows of 40 that evaluation does not use, but 5 asked for" in said


# --- evaluations that are too short -------------------------------------------------------------


def test_text_shorter_than_asked_for(base: Path, tmp_path: Path) -> None:
    entry = {**EVALUATION, "source": {"text": prose(50)}}
    said = refusal(base, tmp_path, entry)
    assert "has 50 tokens, so 3 windows of 16 fit, but 4 asked for" in said and "Ask for 3 or fewer" in said
    said = refusal(base, tmp_path, {**entry, "window": 64, "windows": None})
    assert "no window of 64 fits" in said and "window of 50 or fewer" in said
    assert run(base, tmp_path, {**entry, "windows": 3})


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    small = make_base(tmp_path / "small", bos=False, vocab_size=20)
    said = refusal(small, tmp_path, {**EVALUATION, "source": {"text": prose(100)}})
    assert "vocabulary has 20" in said and "not of the same model" in said


def test_base_without_a_tokenizer(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((base / "config.json").read_text())
    assert "tokenizer cannot be loaded" in refusal(broken, tmp_path, {**EVALUATION, "source": {"text": "x"}})


def test_misspelt_words(base: Path, tmp_path: Path) -> None:
    entry = {**EVALUATION, "source": {"text": prose(100)}}
    assert "Did you mean 'second-half'?" in refusal(base, tmp_path, {**entry, "score": "second_half"})
    assert "Did you mean 'evaluation'?" in refusal(base, tmp_path, {**entry, "role": "evalution"})
    assert "Did you mean 'dataset'?" in refusal(base, tmp_path, {**entry, "source": {"datset": "x"}})
    assert "text source is empty" in refusal(base, tmp_path, {**entry, "source": {}})
    assert "too short" in refusal(base, tmp_path, {**entry, "window": 2})


# --- texts --------------------------------------------------------------------------------------


def no_text(source: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read_text(source_of(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_module_text_is_joined_in_the_order_of_keys() -> None:
    from pydoc_data.topics import topics

    text = read_text(source_of({"module": "pydoc_data.topics"}))
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)
    assert text.startswith(topics[min(topics)]) and text.endswith(topics[max(topics)])


def test_module_that_holds_a_string_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "corpus_one.py").write_text("BODY = 'some text'\n")
    (tmp_path / "corpus_two.py").write_text("a = 'x'\nb = {'k': 1}\n")
    (tmp_path / "corpus_none.py").write_text("import json\n")
    assert read_text(source_of({"module": "corpus_one"})) == "some text"
    (tmp_path / "corpus_own.py").write_text("a = 'x'\ncorpus_own = {'b': 'y', 'a': 'z'}\n")
    (tmp_path / "corpus_numbers.py").write_text("b = {'k': 1}\n")
    assert read_text(source_of({"module": "corpus_own"})) == "z\n\ny"
    assert "it holds several (a, b)" in no_text({"module": "corpus_two"})
    assert "more than strings" in no_text({"module": "corpus_numbers"})
    assert "neither strings nor mappings" in no_text({"module": "corpus_none"})
    assert "cannot be imported" in no_text({"module": "corpus_absent"})


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo\nthere", encoding="utf-8")
    assert read_text(source_of({"file": str(tmp_path / "a.txt")})) == "héllo\nthere"
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one\u2028x", "body": "1"}\n\n{"text": "two", "body": "2"}\n', encoding="utf-8"
    )
    assert read_text(source_of({"file": str(tmp_path / "b.jsonl")})) == "one\u2028x\n\ntwo"
    assert read_text(source_of({"file": str(tmp_path / "b.jsonl"), "field": "body"})) == "1\n\n2"


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("   \n")
    assert "is empty" in no_text({"file": str(file)})
    file.write_bytes(b"PAR1\0\0\1")
    assert "binary file (a zero byte at 4)" in no_text({"file": str(file)})
    file.write_bytes(b"caf\xe9 au lait")
    assert "not UTF-8 text (byte 3)" in no_text({"file": str(file)})
    assert "Did you mean 'a.txt'?" in no_text({"file": str(tmp_path / "a.tx")})
    assert "is a directory" in no_text({"file": str(tmp_path)})
    assert "is empty" in no_text({"text": ""})


def test_bad_jsonl_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for content, said in (
        ('{"text": "x"}\n{"txt": "y"}\n', "line 2: field 'text' is missing. Did you mean 'txt'?"),
        ('{"text": "x"}\n\n{"text": 3}\n', "line 3: field 'text' is not text"),
        ('{"text": "x"}\n{"text": \n', "line 2 is not valid JSON"),
        ('["text"]\n', "line 1: field 'text' is missing"),
    ):
        file.write_text(content)
        assert said in no_text({"file": str(file)})


def test_package_files() -> None:
    assert "pip install not-there-at-all" in no_text({"package": "not-there-at-all", "file": "x"})
    assert "Did you mean 'pytest/__init__.py'?" in no_text({"package": "pytest", "file": "pytest/__init_.py"})
    assert "which `file`" in no_text({"package": "pytest"})
    assert "pytest" in read_text(source_of({"package": "pytest", "file": "pytest/__init__.py"}))


@pytest.mark.slow
def test_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    (folder / "test.jsonl").write_text("\n".join(lines))
    source = {"dataset": str(folder), "split": "test"}
    text = read_text(source_of(source))
    assert text.startswith("document 0\n\ndocument 1\n\n") and text.endswith("document 49")
    streamed = read_text(source_of({**source, "dataset": str(folder.rename(tmp_path / "c4"))}), need_tokens=10)
    folder.symlink_to("c4")
    assert text.startswith(streamed) and 80 < len(streamed) < 200
    assert "no text field 'body'" in no_text({**source, "field": "body"})
    assert "split" in no_text({**source, "split": "tset"})
    assert "does not exist" in no_text({"dataset": str(tmp_path / "absent")})


@pytest.mark.slow
def test_dataset_without_a_hub(tmp_path: Path) -> None:
    code = (
        "from workbench.worker.tokens.text import read_text, source_of\nfrom workbench.errors import UserError\n"
        "try: read_text(source_of({'dataset': 'wikitext', 'config': 'wikitext-2-raw-v1', 'split': 'test'}))\n"
        "except UserError as error: print('UserError', error)\n"
    )
    for extra in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **extra},
            capture_output=True,
            text=True,
            timeout=120,
        )
        said = done.stdout.strip()
        assert said.startswith("UserError dataset 'wikitext' wikitext-2-raw-v1 test"), done.stderr
        assert "`file:`" in said and "\n" not in said
