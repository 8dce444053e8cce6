"""The borders of a recipe: every number has an end, every name is a file's, every word a length; and each refusal is a
short line that names the field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.places import ROOT
from workbench.errors import UserError
from workbench.recipe.json_schema import schema
from workbench.recipe.load import load, parse
from workbench.recipe.sources import Base
from workbench.recipe.words import LONGEST_NAME

GOOD: dict[str, Any] = {"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}], "evaluation": {"source": {"text": "a"}}}
SOURCE = {"source": {"text": "a"}}
LONG = "n" * 300
HUGE = 10**9


def refused(data: Any) -> str:
    """The line that a recipe is refused with."""
    with pytest.raises(UserError) as caught:
        parse({**GOOD, **data}, Path("r.yaml"))
    return short_line(caught.value)


def refused_file(path: Path, content: str | bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        load(path)
    return short_line(caught.value, str(path))


def short_line(error: UserError, path: str = "") -> str:
    text = str(error)
    assert text.isprintable() and len(text.replace(path, "")) < 300, text
    return text


# --- numbers ------------------------------------------------------------------------------------

NUMBERS: list[tuple[str, dict[str, Any], str]] = [
    ("workload.repeats", {"workload": {"repeats": HUGE}}, "less than or equal to 1000"),
    ("workload.warmup", {"workload": {"warmup": HUGE}}, "less than or equal to 1000"),
    ("workload.requests", {"workload": {"requests": HUGE}}, "less than or equal to 1000"),
    ("workload.batch", {"workload": {"batch": HUGE}}, "less than or equal to 4096"),
    ("workload.batch[1]", {"workload": {"batch": [1, HUGE]}}, "less than or equal to 4096"),
    ("workload.prompt_tokens", {"workload": {"prompt_tokens": HUGE}}, "less than or equal to 1048576"),
    ("workload.new_tokens", {"workload": {"new_tokens": HUGE}}, "less than or equal to 1048576"),
    ("workload.seed", {"workload": {"seed": -1}}, "greater than or equal to 0"),
    ("workload.seed", {"workload": {"seed": 10**4000}}, "less than 4294967296"),
    ("evaluation.window", {"evaluation": {**SOURCE, "window": HUGE}}, "less than or equal to 1048576"),
    ("evaluation.windows", {"evaluation": {**SOURCE, "windows": HUGE}}, "less than or equal to 100000"),
    ("evaluation", {"evaluation": {**SOURCE, "window": 2**20, "windows": 65}}, "67,108,864 tokens at most, not 68,157"),
    ("calibration", {"calibration": {**SOURCE, "windows": 10**5, "window": 2048}}, "67,108,864 tokens at most"),
    ("evaluation.stride", {"evaluation": {**SOURCE, "score": "strided", "stride": HUGE}}, "less than or equal to"),
    ("calibration.window", {"calibration": {**SOURCE, "window": HUGE}}, "less than or equal to 1048576"),
    ("calibration.windows", {"calibration": {**SOURCE, "windows": HUGE}}, "less than or equal to 100000"),
    ("calibration.seed", {"calibration": {**SOURCE, "seed": 2**32}}, "less than 4294967296"),
    ("calibration.devices", {"calibration": {**SOURCE, "devices": 0}}, "greater than or equal to 1"),
    ("calibration.devices", {"calibration": {**SOURCE, "devices": HUGE}}, "less than or equal to 64"),
    ("base.seed", {"base": {"path": "x", "seed": 2**32}}, "less than 4294967296"),
    ("base.equivalent.hidden", {"base": {"path": "x", "equivalent": {"hidden": HUGE}}}, "less than or equal to 131072"),
    ("limits.profile_s", {"limits": {"profile_s": HUGE}}, "less than or equal to 2592000"),
    ("limits.profile_s", {"limits": {"profile_s": float("inf")}}, "finite number"),
    ("limits.quantize_s", {"limits": {"quantize_s": float("nan")}}, "finite number"),
    ("tasks.t.limit", {"tasks": {"t": {"file": "t.yaml", "limit": HUGE}}}, "less than or equal to 1000000"),
    ("tasks.t.new_tokens", {"tasks": {"t": {"file": "t.yaml", "new_tokens": HUGE}}}, "less than or equal to 1048576"),
    ("tasks.t.shots", {"tasks": {"t": {"lm_eval": "arc", "shots": HUGE}}}, "less than or equal to 1000"),
    ("backends.llamacpp.threads", {"backends": {"llamacpp": {"threads": HUGE}}}, "less than or equal to 1024"),
    ("backends.transformers.threads", {"backends": {"transformers": {"threads": 0}}}, "greater than or equal to 1"),
    ("backends.vllm.threads", {"backends": {"vllm": {"threads": -1}}}, "greater than or equal to 1"),
    ("backends.vllm.tensor_parallel", {"backends": {"vllm": {"tensor_parallel": 0}}}, "greater than or equal to 1"),
    ("backends.llamacpp.gpu_layers", {"backends": {"llamacpp": {"gpu_layers": -2}}}, "greater than or equal to -1"),
    ("group_size", {"variants": [{"awq": {"group_size": 16 * HUGE}}], "calibration": SOURCE}, "up to 65536, or -1"),
    ("group_size", {"variants": [{"gptq": {"group_size": 0}}], "calibration": SOURCE}, "up to 65536, or -1"),
    ("base.config", {"base": {"init": "random", "config": {"eps": [{"x": float("nan")}]}}}, "numbers must be finite"),
    ("base.config", {"base": {"init": "random", "config": {"layers": 10**30}}}, "of 64 bits at most"),
]


@pytest.mark.parametrize(("field", "data", "allowed"), NUMBERS, ids=[f"{f}-{i}" for i, (f, *_) in enumerate(NUMBERS)])
def test_numbers_have_an_end(field: str, data: dict[str, Any], allowed: str) -> None:
    said = refused(data)
    assert field in said and allowed in said


def test_editors_know_the_ends() -> None:
    known: Any = schema()
    assert known["$defs"]["WorkloadModel"]["properties"]["repeats"]["maximum"] == 1000
    llamacpp = known["$defs"]["llamacpp"]
    assert llamacpp["properties"]["threads"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 1024}


def test_an_engines_own_limit_is_known_before_it_is_loaded() -> None:
    assert parse({**GOOD, "workload": {"batch": 256}}, Path("r.yaml"))
    assert parse({**GOOD, "workload": {"batch": 257}, "backends": ["vllm"]}, Path("r.yaml"))
    said = refused({"workload": {"batch": [1, 257]}})
    assert "workload.batch: llamacpp takes 256 sequences at once at most, not 257" in said


def test_the_limit_is_the_engines() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    from workbench.worker.backends import llamacpp

    assert llama_cpp.llama_max_parallel_sequences() == llamacpp.MOST_SEQUENCES


# --- names --------------------------------------------------------------------------------------

BAD_NAMES = (
    "base.json",
    "",
    LONG,
    "../x",
    "a/b",
    "a\\b",
    "..",
    ".",
    ".hidden",
    "-x",
    "a b",
    "a\nb",
    "con",
    "NUL.txt",
    "Com1",
    "x.",
)


@pytest.mark.parametrize("name", [*BAD_NAMES, "ü" * 60])
def test_a_name_that_names_no_file_is_refused_everywhere(name: str) -> None:
    for place, data in (
        ("name: ", {"name": name}),
        ("model: ", {"model": name}),
        ("variants[0].name: ", {"variants": [{"gguf": "Q4_0", "name": name}]}),
        ("evaluation.name: ", {"evaluation": {**SOURCE, "name": name}}),
        ("evaluation", {"evaluation": {name: SOURCE, "other": SOURCE}}),
        ("tasks", {"tasks": {name: {"file": "t.yaml"}}}),
    ):
        assert f"r.yaml: {place}" in refused(data)


@pytest.mark.parametrize("name", [0, None, False, 1.5, ["a"], {"a": 1}])
def test_a_name_is_a_word(name: Any) -> None:
    assert "variants[0].name: letters, digits" in refused({"variants": [{"gguf": "Q4_0", "name": name}]})


def test_names_that_differ_in_case_alone_are_one_file() -> None:
    two = [{"gguf": "Q4_0", "name": "a"}, {"gguf": "Q8_0", "name": "A"}]
    assert "variants[1]: a variant named 'a' is already there" in refused({"variants": two})
    assert "evaluation.E: a set named 'e' is already there" in refused({"evaluation": {"e": SOURCE, "E": SOURCE}})
    tasks = {"t": {"file": "a"}, "T": {"file": "b"}}
    assert "tasks: 'T' and 't' would be one file" in refused({"tasks": tasks})


def test_names_that_nobody_chose_are_names_too(tmp_path: Path) -> None:
    assert len(Base(path="ü" * 300).stem().encode()) <= LONGEST_NAME
    path = tmp_path / f"a\n{'b' * 200}.yaml"
    path.write_text(json.dumps(GOOD))
    name = load(path).name
    assert name.startswith("a-bb") and name.isprintable() and len(name) <= LONGEST_NAME


# --- words and paths ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"base": {"path": "~nobody-here/x"}}, "base.path: ~nobody-here/x: nobody of that name has a folder here"),
        ({"base": {"config": "~nobody-here/x", "init": "random"}}, "base.config: ~nobody-here/x: nobody"),
        ({"calibration": {"source": {"file": "~nobody-here/x"}}}, "calibration.source.file: ~nobody-here/x: nobody"),
        ({"tasks": {"t": {"file": "~nobody-here/x"}}}, "tasks.t.file: ~nobody-here/x: nobody"),
        ({"tasks": {"t": {"lm_eval": "a", "include": "~nobody-here/x"}}}, "tasks.t.include: ~nobody-here/x: nobody"),
        ({"evaluation": {"source": {"module": ".topics"}}}, "evaluation.source.module: String should match pattern"),
        ({"evaluation": {"source": {"module": "a..b"}}}, "evaluation.source.module: String should match pattern"),
        ({"evaluation": {"source": {"module": "a/b"}}}, "evaluation.source.module: String should match pattern"),
        ({"evaluation": {"source": {"module": LONG * 9}}}, "evaluation.source.module: String should have at most 1000"),
        ({"base": {"package": "-x", "file": "a"}}, "base.package: String should match pattern"),
        ({"base": {"package": "p", "file": "/etc/hostname"}}, "base: `file` is a path inside the package, not '/etc"),
        ({"base": {"package": "p", "file": "."}}, "base: `file` is a path inside the package, not '.'"),
        ({"calibration": {"source": {"package": "p", "file": "../x"}}}, "calibration.source: `file` is a path inside"),
        ({"base": {"hub": "../../x"}}, "base.hub: String should match pattern"),
        ({"base": {"path": LONG * 9}}, "base.path: String should have at most 1000"),
        ({"variants": [{"gguf": LONG}]}, "variants[0].gguf.type: unknown value 'nnn"),
        ({"variants": [LONG]}, "variants[0]: unknown method 'nnn"),
        ({"variants": [{"gguf": {LONG: 1, "type": "Q4_0"}}]}, "variants[0].gguf: unknown key 'nnn"),
        (
            {"variants": [{"awq": {"modules_to_not_convert": ["q", ""]}}]},
            "variants[0]: awq: modules_to_not_convert: an em",
        ),
        ({"variants": [{"gguf": "Q4_0"}] * 201}, "variants: 200 at most, not 201"),
        ({"backends": {LONG: {}}}, "backends: unknown backend 'nnn"),
        ({"backends": {"vllm": {"variants": [LONG]}}}, "backends.vllm.variants: unknown variant 'nnn"),
        ({"evaluation": {**SOURCE, "score": LONG}}, "evaluation.score: unknown value 'nnn"),
        ({LONG: 1}, "unknown key 'nnn"),
        ({"workload": {"a.b": 1}}, "workload: unknown key 'a.b'"),
    ],
)
def test_words_that_cannot_be_are_refused_in_their_place(data: dict[str, Any], said: str) -> None:
    assert f"r.yaml: {said}" in refused(data)


# --- files --------------------------------------------------------------------------------------

REST = "variants: [{gguf: Q4_0}]\n"
NESTED = "a: &a {x: 1, y: 2, z: 3}\n" + "".join(
    f"{new}: &{new} {{{', '.join(f'k{i}: *{old}' for i in range(6))}}}\n" for old, new in zip("abc", "bcd", strict=True)
)
MERGED = "a: &a {" + ", ".join(f"k{i}: 1" for i in range(2000)) + "}\n" + "b: {<<: [*a, *a, *a]}\n"
FILES: dict[str, tuple[str | bytes, str]] = {
    "values": (f"base: [{'1,' * 90_000}]\n", "a recipe may hold 10,000 values at most, aliases spelt out"),
    "merged": (MERGED, "a recipe may hold 10,000 values at most, aliases spelt out"),
    "nested": (NESTED, "unknown key 'a'"),
    "letters": (f"base: {{path: {'x' * 190_000}}}\n{REST}", "base.path: String should have at most 1000"),
    "decimal": (f"base: {{path: x, seed: {'9' * 4000}}}\n", ":1: not valid YAML: a number of more than 40 digits"),
    "sexagesimal": (f"base: {':'.join(['1'] * 90_000)}.5\n", ":1: not valid YAML: a number of more than 40 digits"),
    "hexadecimal": (f"base: 0x{'f' * 190_000}\n", ":1: not valid YAML: a number of more than 40 digits"),
    "word-for-infinity": (
        "base: {init: random, config: {theta: 1e999}}\n" + REST,
        "base.config: numbers must be finite",
    ),
    "control": ('base: {path: "a\\x1b[31m"}\n', "the character U+001B, which is no text (line 1)"),
    "surrogate": ('base:\n  path: "\\ud800"\n', "the character U+D800, which is no text (line 2)"),
    "zero": ('base:\n  path: "\\0"\n', "the character U+0000, which is no text (line 2)"),
    "bytes": (b"base: {path: x}\n# caf\xe9\n", ":2: cannot be read as text: 'utf-8' codec"),
    "set": ("base: !!set {x}\n", ":1: not valid YAML: could not determine a constructor for the tag"),
    "binary": ("base: {hub: !!binary aGVsbG8=}\n", ":1: not valid YAML: could not determine a constructor"),
    "merged-list-key": ("base: {<<: {[a]: 1}}\n", ":1: not valid YAML: a key must be a word"),
    "long-key-twice": (f"{'k' * 900}: 1\n{'k' * 900}: 2\n", ":2: not valid YAML: 'kkk"),
    "long-tag": (f"base: !{'x' * 100_000} y\n", ":1: not valid YAML: could not determine a constructor"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_no_recipe_can_be(tmp_path: Path, name: str) -> None:
    content, said = FILES[name]
    assert said in refused_file(tmp_path / "r.yaml", content)


def test_a_date_and_a_number_as_keys_are_words(tmp_path: Path) -> None:
    text = (
        f"name: 2026-01-31\nbase: {{init: random, config: {{model_type: llama, id2label: {{0: a, yes: b}}}}}}\n{REST}"
    )
    (tmp_path / "r.yaml").write_text(text)
    loaded = load(tmp_path / "r.yaml")
    assert loaded.name == "2026-01-31"
    assert loaded.base.config == {"model_type": "llama", "id2label": {"0": "a", "yes": "b"}}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    assert refused_file(tmp_path / "r.yaml").endswith("a pipe, not a recipe: write it into a file")


def test_paths_that_no_system_has() -> None:
    assert "cannot be read as text: File name too long" in refused_file(Path(LONG))
    assert "~nobody-here/r.yaml: nobody of that name has a folder here" in refused_file(Path("~nobody-here/r.yaml"))


def test_the_shipped_recipes_are_within_their_borders() -> None:
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert load(path).digest == parse(yaml.safe_load(path.read_text()), path).digest
