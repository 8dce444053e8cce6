"""Recipes: what is right loads, what is wrong is one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.places import ROOT
from workbench.errors import UserError
from workbench.recipe.choices import form_for, limits_of
from workbench.recipe.json_schema import schema
from workbench.recipe.load import load, parse
from workbench.recipe.sources import Base
from workbench.recipe.yaml_text import MAX_BYTES

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD: dict[str, Any] = {
    "base": {"path": "somewhere"},
    "variants": [{"gguf": "Q4_0"}],
    "evaluation": {"source": {"text": "words"}},
}


def recipe(**more: Any) -> dict[str, Any]:
    """A good recipe with some parts replaced; None takes a part away."""
    return {key: value for key, value in {**GOOD, **more}.items() if value is not None}


def refused(data: Any) -> str:
    """The one line that a recipe is refused with."""
    with pytest.raises(UserError) as caught:
        parse(data, Path("r.yaml"))
    text = str(caught.value)
    assert "\n" not in text and text.startswith("r.yaml")
    return text


def written(folder: Path, text: str | bytes, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused_file(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


# --- what is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    loaded = load(path)
    assert loaded.name == path.stem
    assert loaded.variants[0].name == loaded.variants[0].method == "base"
    assert list(dict.fromkeys(choice.name for choice in loaded.backends)) == ["transformers", "vllm", "llamacpp"]
    assert loaded.evaluations or loaded.base.init == "random"


def test_at_least_the_three_promised_recipes() -> None:
    assert {"smollm2-135m", "llama8b", "tiny"} <= {path.stem for path in RECIPES}


def test_defaults_are_filled_in() -> None:
    loaded = parse(recipe(), Path("folder/mine.yaml"))
    assert (loaded.name, loaded.model) == ("mine", "somewhere")
    assert [(v.name, v.method, v.options) for v in loaded.variants] == [
        ("base", "base", {}),
        ("gguf-Q4_0", "gguf", {"type": "Q4_0", "imatrix": False, "encoder": "auto"}),
    ]
    assert (loaded.workload.prompt_tokens, loaded.workload.new_tokens, loaded.workload.repeats) == ([512], 64, 3)
    assert [test.window for test in loaded.evaluations.values()] == [512]
    assert all(choice.takes("gguf-Q4_0") for choice in loaded.backends)


def test_variants_may_be_written_short_or_long() -> None:
    entries = [{"gguf": "Q8_0"}, {"gguf": {"type": "Q4_0"}, "name": "mine"}, "awq", {"gptq": None}]
    loaded = parse(
        recipe(variants=entries, calibration={"source": {"text": "other words"}}, backends=["llamacpp"]), Path("r.yaml")
    )
    assert [v.name for v in loaded.variants][:3] == ["base", "gguf-Q8_0", "mine"]
    assert [v.method for v in loaded.variants] == ["base", "gguf", "gguf", "awq", "gptq"]
    assert form_for(loaded.variant("mine"), "llamacpp") == "gguf"
    assert form_for(loaded.variant("base"), "vllm") == "safetensors"
    assert limits_of(loaded.variant("base")) == {}


def test_patterns_choose_what_a_backend_takes() -> None:
    loaded = parse(
        recipe(variants=[{"gguf": "Q4_0"}, {"gguf": "Q8_0"}], backends={"llamacpp": {"variants": ["base", "*Q8*"]}}),
        Path("r.yaml"),
    )
    choice = loaded.backend("llamacpp")
    assert [v.name for v in loaded.variants if choice.takes(v.name)] == ["base", "gguf-Q8_0"]
    assert loaded.backend("vllm").options == {}, "a backend that the recipe does not list may still be asked for"


def test_relative_paths_are_the_recipes_own(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    loaded = load(written(tmp_path / "sub", yaml.safe_dump(recipe(base={"path": "../model"}))))
    assert Path(loaded.base.source(loaded.path.parent)["path"]).resolve() == (tmp_path / "model").resolve()


def test_what_decides_the_digest() -> None:
    def digest(**more: Any) -> str:
        return parse(recipe(**more), Path("r.yaml")).digest

    assert digest() == digest(workload={"repeats": 3}), "a default written out changes nothing"
    assert digest() != digest(workload={"repeats": 4})
    assert digest() != digest(variants=[{"gguf": "Q4_1"}])
    assert digest() != digest(backends=["llamacpp"])
    source = {"source": {"text": "other words"}}
    said = {devices: digest(calibration={**source, "devices": devices}) for devices in ("auto", 1, 2)}
    assert digest(calibration=source) == said["auto"] and len({*said.values()}) == 3


def test_yaml_anchors_and_merges_are_allowed(tmp_path: Path) -> None:
    text = (
        "base: {path: x}\nvariants: [{gguf: Q4_0}]\n"
        "calibration: &tokens {source: {text: a}, windows: 4, window: 64}\n"
        "evaluation: {<<: *tokens, windows: 2}\n"
    )
    loaded = load(written(tmp_path, text))
    assert loaded.calibration is not None
    (test,) = loaded.evaluations.values()
    assert (test.windows, test.window, loaded.calibration.windows) == (2, 64, 4)


@pytest.mark.parametrize(
    "base, stem",
    [
        ({"hub": "meta-llama/Llama-3.1-8B-Instruct"}, "Llama-3.1-8B-Instruct"),
        ({"path": "/models/SmolLM2-135M-Instruct"}, "SmolLM2-135M-Instruct"),
        ({"path": "/models/SmolLM2-135M-Instruct/"}, "SmolLM2-135M-Instruct"),
        ({"path": "m/SmolLM2-135M-Instruct.Q4_1.gguf"}, "SmolLM2-135M-Instruct"),
        ({"path": "m/Model-IQ4_XS.gguf"}, "Model"),
        ({"path": "m/Model-bf16.gguf"}, "Model"),
        ({"path": "m/Model-Q4_K_M.gguf"}, "Model"),
        ({"package": "p", "file": "p/Model.Q4_1.gguf"}, "Model"),
        ({"config": "shapes/one.json", "init": "random"}, "one"),
        ({"config": {"model_type": "llama"}, "init": "random"}, "llama"),
        ({"config": {"model_type": "../../etc/x"}, "init": "random"}, "etc-x"),
        ({"path": ".."}, "model"),
        ({"path": "."}, "model"),
        ({"path": "/models/my model\n"}, "my-model-"),
    ],
)
def test_the_models_name_is_a_file_name(base: dict[str, Any], stem: str) -> None:
    assert Base(**base).stem() == stem == Path(stem).name


def test_loading_touches_nothing_but_the_recipe(tmp_path: Path) -> None:
    """A base that does not exist, a package that is not installed, a hub that is not there: all load."""
    path = written(tmp_path, yaml.safe_dump(recipe(base={"path": str(tmp_path / "nothing")}), sort_keys=False))
    program = f"""
import sys
touched = []
def watch(event, arguments):
    if event.startswith(("open", "os.", "subprocess.", "socket.")):
        touched.append((event, str(arguments[0])))
from workbench.recipe.load import load, parse
from pathlib import Path
load({str(ROOT / "recipes" / "llama8b.yaml")!r})  # so that every module is imported
from workbench.worker.backends import BACKENDS, backend_named
[backend_named(name) for name in BACKENDS]  # some of which only recipes get that name them
sys.addaudithook(watch)
load({str(path)!r})
tokens = {{"source": {{"dataset": "no/such"}}}}
base = {{"package": "no-such-package", "file": "x"}}
parse({{"base": base, "variants": ["awq"], "calibration": tokens}}, Path("r.yaml"))
engines = ("torch", "transformers", "vllm", "llama_cpp", "gguf", "numpy", "huggingface_hub")
loaded = [name for name in engines if name in sys.modules]
print(touched == [("open", {str(path)!r})] and not loaded, touched, loaded)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "WORKBENCH_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
    )
    assert answer.stdout.startswith("True"), answer.stdout + answer.stderr
    assert not (tmp_path / "home").exists()


# --- the schema ---------------------------------------------------------------------------------


def test_the_published_schema_is_the_present_one() -> None:
    published = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert published == json.loads(json.dumps(schema())), "run `workbench schema > recipes/recipe.schema.json`"


def keys_of(part: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that an object in a schema may have, with its own schema."""
    if isinstance(part, dict):
        for key, value in part.get("properties", {}).items():
            yield f"{place}/{key}", value
        for name, value in part.items():
            yield from keys_of(value, f"{place}/{name}" if name != "properties" else place)
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from keys_of(value, f"{place}[{number}]")


def test_every_key_says_what_it_means() -> None:
    keys = dict(keys_of(schema()))
    assert len({key.rpartition("/")[2] for key in keys}) > 60
    silent = [place for place, value in keys.items() if len(value.get("description", "")) < 8]
    assert not silent, "give these keys a docstring (workbench/recipe/model.py, or the options of the method or engine)"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_the_schema_and_satisfy_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=./recipe.schema.json\n")
    jsonschema.validate(yaml.safe_load(text), schema(), jsonschema.Draft202012Validator)


# --- what is wrong ------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "top": ({"varients": []}, "unknown key 'varients'. Did you mean 'variants'?"),
    "top-far": ({"zzz": 1}, "unknown key 'zzz'. Known: backends, base, calibration, endpoints, evaluation, limits,"),
    "base": ({"base": {"hubb": "a/b"}}, "base: unknown key 'hubb'. Did you mean 'hub'?"),
    "base-beside-a-good-one": (
        {"base": {"hub": "a/b", "revison": "x"}},
        "base: unknown key 'revison'. Did you mean 'revision'?",
    ),
    "equivalent": (
        {"base": {"path": "x", "equivalent": {"hiden": 768}}},
        "base.equivalent: unknown key 'hiden'. Did you mean 'hidden'?",
    ),
    "evaluation": (
        {"evaluation": {"source": {"text": "a"}, "windw": 1}},
        "evaluation: unknown key 'windw'. Did you mean 'window'?",
    ),
    "source": (
        {"evaluation": {"source": {"datset": "a"}}},
        "evaluation.source: unknown key 'datset'. Did you mean 'dataset'?",
    ),
    "calibration": (
        {"calibration": {"source": {"text": "a"}, "sede": 1}},
        "calibration: unknown key 'sede'. Did you mean 'seed'?",
    ),
    "calibration-devices": (
        {"calibration": {"source": {"text": "a"}, "devices": "4"}},
        "r.yaml: calibration.devices: unknown value '4'. Known: auto.",
    ),
    "workload": (
        {"workload": {"promt_tokens": 1}},
        "workload: unknown key 'promt_tokens'. Did you mean 'prompt_tokens'?",
    ),
    "limits": ({"limits": {"profile": 1}}, "limits: unknown key 'profile'. Did you mean 'profile_s'?"),
    "method": ({"variants": [{"ggfu": "Q4_0"}]}, "variants[0]: unknown method 'ggfu'. Did you mean 'gguf'?"),
    "method-word": ({"variants": ["gptqq"]}, "variants[0]: unknown method 'gptqq'. Did you mean 'gptq'?"),
    "type": (
        {"variants": [{"gguf": "Q4_K_X"}]},
        "variants[0].gguf.type: unknown value 'Q4_K_X'. Did you mean 'Q4_K_S'?",
    ),
    "type-case": ({"variants": [{"gguf": "q4_k_m"}]}, "unknown value 'q4_k_m'. Did you mean 'Q4_K_M'?"),
    "type-number": ({"variants": [{"gguf": 4}]}, "variants[0].gguf.type: unknown value '4'."),
    "type-missing": ({"variants": ["gguf"]}, "one of type, size, bits, like says how large the file becomes, and here"),
    "type-and-size": ({"variants": [{"gguf": {"type": "Q4_K_M", "size": "1GiB"}}]}, "and here is type and size"),
    "keep-and-type": (
        {"variants": [{"gguf": {"type": "Q4_K_M", "types": ["Q4_K"]}}]},
        "give one of these, and no type",
    ),
    "size-bare": ({"variants": [{"gguf": {"size": "4"}}]}, "size 4: write a size with its unit, such as 8GiB or 800MB"),
    "bits-many": ({"variants": [{"gguf": {"bits": 17}}]}, "bits: 1 to 16 a weight, not 17"),
    "types-value": ({"variants": [{"gguf": {"bits": 5, "types": ["Q4_K_M"]}}]}, "unknown value 'Q4_K_M'"),
    "keep-value": ({"variants": [{"gguf": {"bits": 5, "keep": {"*": "Q9"}}}]}, "unknown value 'Q9'"),
    "chosen-by-workbench": (
        {"variants": [{"gguf": {"bits": 5, "encoder": "workbench"}}]},
        "encoder workbench makes mixtures by their `type` only",
    ),
    "size-without-calibration": ({"variants": [{"gguf": {"size": "1GiB"}}]}, "add a `calibration`"),
    "bits-value": (
        {"variants": [{"awq": {"bits": 5}}], "calibration": {"source": {"text": "x"}}},
        "variants[0].awq.bits: unknown value '5'. Known: 4.",
    ),
    "second-variant": ({"variants": [{"gguf": "Q4_0"}, {"gguf": "Q9"}]}, "variants[1].gguf.type: unknown value 'Q9'."),
    "option": ({"variants": [{"gguf": {"typ": "Q4_0"}}]}, "variants[0].gguf: unknown key 'typ'. Did you mean 'type'?"),
    "option-known": (
        {"variants": [{"gguf": {"type": "Q4_0", "imatrx": True}}]},
        "variants[0].gguf: unknown key 'imatrx'. Did you mean 'imatrix'?",
    ),
    "group-size": (
        {"variants": [{"awq": {"group_szie": 64}}]},
        "r.yaml: variants[0].awq: unknown key 'group_szie'. Did you mean 'group_size'?",
    ),
    "bits": ({"variants": [{"awq": {"bits": "4"}}]}, "variants[0].awq.bits: "),
    "backend": ({"backends": {"vlm": {}}}, "backends: unknown backend 'vlm'. Did you mean 'vllm'?"),
    "backend-list": ({"backends": ["lama.cpp"]}, "backends: unknown backend 'lama.cpp'. Did you mean 'llamacpp'?"),
    "backend-list-of-mappings": ({"backends": [{"vllm": {}}]}, "backends: a list of names or a mapping"),
    "backend-options": ({"backends": {"vllm": 1}}, "backends.vllm: a mapping of options, a list of such, or nothing"),
    "backend-option": (
        {"backends": {"transformers": {"dtpye": "auto"}}},
        "backends.transformers: unknown key 'dtpye'. Did you mean 'dtype'?",
    ),
    "backend-variants-key": (
        {"backends": {"vllm": {"variant": ["base"]}}},
        "backends.vllm: unknown key 'variant'. Did you mean 'variants'?",
    ),
    "backend-dtype": (
        {"backends": {"vllm": {"dtype": "bfloat61"}}},
        "backends.vllm.dtype: unknown value 'bfloat61'. Did you mean 'bfloat16'?",
    ),
    "pattern": (
        {"backends": {"vllm": {"variants": ["gguf-Q4_O"]}}},
        "backends.vllm.variants: unknown variant 'gguf-Q4_O'. Did you mean 'gguf-Q4_0'?",
    ),
    "pattern-word": ({"backends": {"vllm": {"variants": "base"}}}, "backends.vllm.variants: a list of variant names"),
    "no-backends": ({"backends": []}, "backends: a list of names or a mapping"),
    "score": (
        {"evaluation": {"source": {"text": "a"}, "score": "second_half"}},
        "evaluation.score: unknown value 'second_half'. Did you mean 'second-half'?",
    ),
    "strided": (
        {"evaluation": {"source": {"text": "a"}, "score": "strided"}},
        "evaluation: `score: strided` needs a `stride`",
    ),
    "stride-too-long": (
        {"evaluation": {"source": {"text": "a"}, "score": "strided", "window": 64, "stride": 64}},
        "needs a `stride` from 1 to 63",
    ),
    "stride-alone": ({"evaluation": {"source": {"text": "a"}, "stride": 4}}, "a `stride` belongs to `score: strided`"),
    "text-number": (
        {"workload": {"prompt_tokens": "512"}},
        "workload.prompt_tokens: Input should be a valid integer (found '512')",
    ),
    "float-for-int": ({"workload": {"prompt_tokens": 512.5}}, "workload.prompt_tokens: "),
    "bool-for-int": ({"workload": {"repeats": True}}, "workload.repeats: "),
    "int-for-bool": ({"base": {"path": "x", "trust_remote_code": 1}}, "base.trust_remote_code: "),
    "word-for-bool": ({"base": {"path": "x", "trust_remote_code": "yes"}}, "base.trust_remote_code: "),
    "zero": ({"workload": {"repeats": 0}}, "workload.repeats: Input should be greater than or equal to 1 (found 0)"),
    "negative": ({"limits": {"profile_s": -1}}, "limits.profile_s: Input should be greater than 0 (found -1)"),
    "nan": ({"limits": {"profile_s": float("nan")}}, "limits.profile_s: "),
    "null": ({"workload": None, "limits": {"profile_s": None}}, "limits.profile_s: "),
    "list-for-mapping": ({"workload": [1]}, "workload: Input should be an object"),
    "word-for-base": (
        {"base": "meta-llama/Llama-3.1-8B"},
        "base: Input should be an object (found 'meta-llama/Llama-3.1-8B')",
    ),
    "name": ({"name": "../../etc"}, "name: String should match pattern"),
    "model": ({"model": "a/b"}, "model: String should match pattern"),
    "variant-name": ({"variants": [{"gguf": "Q4_0", "name": "a b"}]}, "variants[0].name: letters, digits"),
    "variant-name-number": ({"variants": [{"gguf": "Q4_0", "name": 5}]}, "variants[0].name: letters, digits"),
    "no-base": ({"base": None}, "base: missing"),
    "base-empty": ({"base": {}}, "base: give exactly one of hub, path, package, config (found none)"),
    "base-two": (
        {"base": {"hub": "a/b", "path": "x"}},
        "base: give exactly one of hub, path, package, config (found hub and path)",
    ),
    "base-blank": ({"base": {"hub": ""}}, "base.hub: "),
    "base-package": ({"base": {"package": "p"}}, "base: a package also needs `file`"),
    "base-config": ({"base": {"config": "c.json"}}, "base: a config alone has no weights: add `init: random`"),
    "source-none": ({"evaluation": {"source": {}}}, "evaluation.source: give exactly one of"),
    "source-two": ({"evaluation": {"source": {"text": "a", "module": "b"}}}, "(found module and text)"),
    "source-word": ({"evaluation": {"source": "wikitext"}}, "evaluation.source: "),
    "source-missing": ({"evaluation": {"windows": 3}}, "evaluation.source: missing"),
    "no-variants": ({"variants": None}, "variants: a list with at least one entry, such as `- gguf: Q4_K_M`"),
    "variants-empty": ({"variants": []}, "variants: a list with at least one entry"),
    "variants-mapping": ({"variants": {"gguf": "Q4_0"}}, "variants: a list with at least one entry"),
    "variant-number": ({"variants": [4]}, "variants[0]: write `- METHOD: {options}`, with METHOD one of"),
    "variant-list": ({"variants": [["gguf"]]}, "variants[0]: write `- METHOD: {options}`"),
    "variant-two-methods": (
        {"variants": [{"gguf": "Q4_0", "awq": {}}]},
        "variants[0]: one method an entry, found gguf, awq",
    ),
    "variant-no-method": ({"variants": [{"name": "x"}]}, "variants[0]: one method an entry, found none"),
    "same-twice": (
        {"variants": [{"gguf": "Q4_0"}, {"gguf": {"type": "Q4_0"}}]},
        "variants[1]: a variant named 'gguf-Q4_0' is already there; give one a `name`",
    ),
    "named-base": (
        {"variants": [{"gguf": "Q4_0", "name": "base"}]},
        "variants[0]: a variant named 'base' is already there",
    ),
    "needs-imatrix": (
        {"variants": [{"gguf": "IQ2_XXS"}]},
        "variants[0]: type IQ2_XXS cannot be made without an importance matrix: write "
        "`gguf: {type: IQ2_XXS, imatrix: true}` and give the recipe a `calibration`",
    ),
    "imatrix-without-calibration": (
        {"variants": [{"gguf": "Q4_0"}, {"gguf": {"type": "IQ2_XXS", "imatrix": True}}]},
        "variants[1] (gguf-IQ2_XXS-imatrix) looks at calibration tokens: add a `calibration`",
    ),
    "awq-without-calibration": ({"variants": ["awq"]}, "looks at calibration tokens: add a `calibration`"),
}

BEYOND_A_SCHEMA = {
    "pattern",
    "strided",
    "stride-too-long",
    "stride-alone",
    "nan",
    "base-package",
    "base-config",
    "variant-name",
    "same-twice",
    "named-base",
    "needs-imatrix",
    "imatrix-without-calibration",
    "keep-and-type",
    "size-bare",
    "bits-many",
    "chosen-by-workbench",
    "size-without-calibration",
    "awq-without-calibration",
}
"""What hangs on other parts of the recipe; only the program can tell."""


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_with_its_place(name: str) -> None:
    change, message = WRONG[name]
    assert message in refused(recipe(**change))


@pytest.mark.parametrize("name", sorted(set(WRONG) - BEYOND_A_SCHEMA))
def test_editors_see_the_same_mistakes(name: str) -> None:
    data = json.loads(json.dumps(recipe(**WRONG[name][0])))
    assert not jsonschema.Draft202012Validator(schema()).is_valid(data)


def test_the_design_documents_example_word_for_word() -> None:
    with pytest.raises(UserError) as caught:
        parse(recipe(variants=[{"awq": {"group_szie": 64}}]), Path("recipes/x.yaml"))
    assert str(caught.value) == "recipes/x.yaml: variants[0].awq: unknown key 'group_szie'. Did you mean 'group_size'?"


@pytest.mark.parametrize("data", [None, [], "text", 4, [{"base": 1}]])
def test_a_recipe_is_a_mapping_of_words(data: Any) -> None:
    assert "a recipe is a mapping with at least `base` and `variants`" in refused(data)


def test_a_key_that_is_no_word() -> None:
    assert "unknown key '1'." in refused({**GOOD, 1: 2})
    assert "workload: unknown key '1'." in refused({**GOOD, "workload": {1: 2}})


def test_names_given_on_the_command_line_are_checked_too() -> None:
    loaded = parse(recipe(), Path("r.yaml"))
    with pytest.raises(UserError, match=re.escape("unknown variant 'gguf-Q4_O'. Did you mean 'gguf-Q4_0'?")):
        loaded.variant("gguf-Q4_O")
    with pytest.raises(UserError, match=re.escape("unknown backend 'lamacpp'. Did you mean 'llamacpp'?")):
        loaded.backend("lamacpp")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "not-yaml": ("base: {path: x\nvariants: [", ":2: not valid YAML: "),
    "tabs": ("base:\n\tpath: x\n", ":2: not valid YAML: "),
    "colon": ("base: a: b\n", ":1: not valid YAML: mapping values are not allowed here"),
    "bomb": (BOMB, "a recipe may have 20 YAML aliases at most"),
    "deep": ("[" * 100_000, "a recipe may be 32 levels deep at most"),
    "deep-blocks": ("\n".join(" " * i + "a:" for i in range(400)), "a recipe may be 32 levels deep at most"),
    "endless": ("base: &a {config: *a}\nvariants: [{gguf: Q4_0}]\n", ":1: not valid YAML: "),
    "endless-list": ("variants: &v [*v]\nbase: {path: x}\n", ":1: not valid YAML: "),
    "twice": ("base: {path: x}\nvariants: []\nbase: {path: y}\n", ":3: not valid YAML: 'base' is given twice"),
    "twice-inside": ("base: {path: x, path: y}\nvariants: []\n", ":1: not valid YAML: 'path' is given twice"),
    "list-key": ("? [a, b]\n: c\n", "not valid YAML: a key must be a word"),
    "object": (
        "base: !!python/object:os.system {}\nvariants: []\n",
        "not valid YAML: could not determine a constructor",
    ),
    "apply": (
        "base: !!python/object/apply:os.system [touch pwned]\n",
        "not valid YAML: could not determine a constructor",
    ),
    "name-tag": ("base: !!python/name:os.system\n", "not valid YAML: could not determine a constructor"),
    "two-documents": ("base: {path: x}\n---\nbase: {path: y}\n", "not valid YAML: but found another document"),
    "unknown-alias": ("base: *nothing\n", "not valid YAML: found undefined alias"),
    "control": (b"base: \x07\n", "not valid YAML: "),
    "huge-number": (f"workload: {{seed: {'9' * 5000}}}\n", "not valid YAML: "),
    "empty": ("", "a recipe is a mapping with at least `base` and `variants`"),
    "comments-only": ("# nothing\n", "a recipe is a mapping with at least `base` and `variants`"),
    "not-text": (b"base: \xff\xfe\n", "cannot be read as text: 'utf-8' codec can't decode byte 0xff"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x93\x00", "cannot be read as text"),
    "huge": ("#" * (MAX_BYTES + 1), "too large for a recipe (at most 200000 bytes)"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = FILES[name]
    assert message in refused_file(written(tmp_path, text))
    assert not (tmp_path / "pwned").exists()


def test_a_missing_file_is_told_with_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path, "", "smollm2.yaml")
    assert refused_file(tmp_path / "smolm2.yaml").endswith(
        f"no such recipe. Did you mean '{tmp_path / 'smollm2.yaml'}'?"
    )
    assert refused_file(tmp_path / "none" / "x.yaml").endswith("no such recipe.")
    (tmp_path / "recipes").mkdir()
    written(tmp_path, "", "recipes/llama.yaml")
    assert refused_file(tmp_path / "lama.yaml").endswith(f"Did you mean '{tmp_path / 'recipes' / 'llama.yaml'}'?")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert refused_file(tmp_path).endswith("a folder, not a recipe")
    assert "cannot be read" in refused_file(written(tmp_path, "") / "inside")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_an_endless_file_is_not_read_to_its_end() -> None:
    assert "too large for a recipe" in refused_file(Path("/dev/zero"))


def test_a_workload_of_lists_is_a_headline_and_further_points() -> None:
    load_ = parse(
        recipe(workload={"prompt_tokens": [512, 128], "batch": [1, 4], "requests": 2}), Path("r.yaml")
    ).workload
    assert (load_.prompt_tokens, load_.batches) == ([512, 128], [1, 4])
    assert load_.points == [(512, 1), (128, 1), (512, 4)]
    assert (load_.longest, load_.most_tokens) == (512 + 96, 4 * (512 + 96))
    single = parse(recipe(workload={"prompt_tokens": 512, "batch": 1}), Path("r.yaml")).workload
    assert single.points == [(512, 1)] and (single.longest, single.most_tokens) == (576, 576)


@pytest.mark.parametrize(
    ("load_", "message"),
    [
        ({"prompt_tokens": [512, 0]}, "workload.prompt_tokens[1]: Input should be greater than or equal to 1"),
        ({"prompt_tokens": []}, "workload.prompt_tokens: List should have at least 1 item"),
        ({"batch": [2, 2]}, "workload: `batch` names a value twice"),
        ({"batch": [1, "x"]}, "workload.batch[1]: Input should be a valid integer (found 'x')"),
        ({"repeats": 0}, "workload.repeats: Input should be greater than or equal to 1 (found 0)"),
        ({"requests": -1}, "workload.requests: Input should be greater than or equal to 0"),
    ],
)
def test_lists_of_a_workload_are_checked_item_by_item(load_: dict[str, Any], message: str) -> None:
    assert message in refused(recipe(workload=load_))


def test_the_kv_cache_is_an_axis() -> None:
    both = parse(recipe(backends={"llamacpp": {"kv_cache": ["f16", "q8_0"], "threads": 2}}), Path("r.yaml"))
    assert [(choice.name, choice.options["kv_cache"], choice.options["threads"]) for choice in both.backends] == [
        ("llamacpp", "f16", 2),
        ("llamacpp", "q8_0", 2),
    ]
    assert both.choices("llamacpp") == list(both.backends) and both.backend("llamacpp") == both.backends[0]
    assert [choice.options for choice in both.choices("vllm")] == [{}]
    assert "Known: f16, q8_0" in refused(recipe(backends={"llamacpp": {"kv_cache": ["f16", "fp8"]}}))
    assert "kv_cache: names a value twice" in refused(recipe(backends={"vllm": {"kv_cache": ["fp8", "fp8"]}}))
    assert "unknown value 'q8_0'" in refused(recipe(backends={"transformers": {"kv_cache": "q8_0"}}))


@pytest.mark.parametrize("engine", ["vllm", "vllm-serve"])
def test_over_how_many_gpus_a_model_is_spread_is_an_axis(engine: str) -> None:
    several = parse(recipe(backends={engine: {"tensor_parallel": [1, 2, 4], "dtype": "float16"}}), Path("r.yaml"))
    assert [(choice.options["tensor_parallel"], choice.options["dtype"]) for choice in several.backends] == [
        (1, "float16"),
        (2, "float16"),
        (4, "float16"),
    ]
    assert "tensor_parallel: names a value twice" in refused(recipe(backends={engine: {"tensor_parallel": [2, 2]}}))
    assert "greater than or equal to 1" in refused(recipe(backends={engine: {"tensor_parallel": [1, 0]}}))


def test_variants_may_run_with_options_of_their_own() -> None:
    """vLLM computes AWQ in 16 bits only: the others may have a dtype that it has not."""
    entries = [{"variants": ["base"]}, {"dtype": "float32", "variants": ["gguf-*"]}]
    both = parse(recipe(variants=[{"gguf": "Q4_0"}], backends={"vllm": entries}), Path("r.yaml"))
    assert [
        (choice.options.get("dtype"), choice.takes("base"), choice.takes("gguf-Q4_0")) for choice in both.backends
    ] == [
        ("auto", True, False),
        ("float32", False, True),
    ]
    jsonschema.validate(recipe(variants=[{"gguf": "Q4_0"}], backends={"vllm": entries}), schema())
    same = [{"variants": ["base"]}, {"variants": ["gguf-*"]}]
    assert "same options; join" in refused(recipe(variants=[{"gguf": "Q4_0"}], backends={"vllm": same}))
    assert "backends.vllm: an empty list" in refused(recipe(backends={"vllm": []}))
    assert "backends.vllm[1].dtype" in refused(recipe(backends={"vllm": [{}, {"dtype": "float23"}]}))


def test_a_configuration_pasted_from_json_keeps_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "base: {init: random, config: {model_type: llama, rms_norm_eps: 1e-05, name: 2e}}\nvariants: [gguf: Q4_0]"
    )
    assert load(file).base.config == {"model_type": "llama", "rms_norm_eps": 1e-5, "name": "2e"}
