"""Keys of what is made and measured, as literals: a key that changes means that all of it is done anew.

They were taken from the program as it was when rows had schema 1. Whoever changes one on purpose (other causes, another
`TASKS_VERSION`) puts the new value here and says in the CHANGELOG that caches and rows start again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.profile import jobs, reference
from workbench.quantize import alone, base, record, tokens
from workbench.quantize.make import Made
from workbench.recipe.choices import making_of
from workbench.recipe.load import Recipe, parse
from workbench.records import Artifact, Evaluation, ImportanceMatrix, PreparedBase, Task, Variant, digest
from workbench.worker.base import prepare

SET = {"source": {"text": "a"}}
PLAIN = {
    "base": {"hub": "a/b"},
    "name": "r",
    "model": "m",
    "variants": [{"gguf": "Q4_0"}, {"gguf": {"type": "Q4_K_M", "imatrix": True}}, {"awq": {}}],
    "calibration": SET,
    "backends": {"llamacpp": None, "transformers": {"dtype": "bfloat16"}},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unnamed": {"evaluation": SET},
    "named": {"evaluation": {**SET, "name": "e", "window": 64}, "workload": {"prompt_tokens": 128, "batch": 2}},
    "several": {
        "evaluation": {"wiki": SET, "c4": {**SET, "window": 64, "score": "all"}},
        "tasks": {"mine": {"file": "t.yaml"}},
        "workload": {"prompt_tokens": [128, 512], "batch": [1, 4], "requests": 2},
    },
}
RECIPES = {
    "plain": "d769d9968e43db0b",
    "unnamed": "71405e5dc7d9212c",
    "named": "648a4b56ac226811",
    "several": "6dfdf996d25499ee",
}
TOKENS = {
    "plain": "45d0e27a3d1f7fa7",
    "unnamed": "ac01d8507d2092b4",
    "named": "343876baccfe46da",
    "several": "6525f4f4b8a969ec",
}
REFERENCES = {
    "plain": {},
    "unnamed": {"evaluation": "fc7c307042a0bf5b"},
    "named": {"e": "fc7c307042a0bf5b"},
    "several": {"wiki": "fc7c307042a0bf5b", "c4": "dadbeba7b9ce04a7"},
}
ROWS = {
    "plain": ["0fe0f1108fdf51b5", "9719fa43fc0229ad", "794349046f653abb", "f5c0f13a28464fdf"],
    "unnamed": ["78c975e32c3abe33", "fd559d54f572080f", "5bcbfed21c9d55e5", "d31cb4138f294c39"],
    "named": ["cba900d0cd3dd37e", "8db20880a3773f0d", "0f45b452c0558299", "a0fe3dc93bdb462f"],
    "several": ["c519a295108ea74d", "bd21b06725206bd5", "ee553a4c1647e7f1", "645618757d4422a1"],
}
"""Of (llama.cpp, transformers) x (base, Q4_0), compared with the base's references."""


class Asked(Exception):
    """Raised in the place of what would be made."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the cache; every package has version 1.0, and there is no GPU."""
    found: list[tuple[str, str]] = []

    def entry(kind: str, key: str, _record: type, _build: Any) -> Any:
        found.append((kind, key))
        raise Asked

    for module in (base, record, tokens):
        monkeypatch.setattr(module, "entry", entry)
    for module in (record, jobs, reference):
        monkeypatch.setattr(
            module, "versions", lambda names, _python="": {name: "1.0" for name in names if name != "lm-eval"}
        )
    for module in (jobs, reference):
        monkeypatch.setattr(module, "uses_gpu", lambda backend: False)
    monkeypatch.setattr(prepare, "identify", lambda source: ["identity", source])
    return found


def a_recipe(form: str = "plain", **more: Any) -> Recipe:
    return parse(PLAIN | FORMS[form] | more, Path("/x/r.yaml"))


def prepared() -> PreparedBase:
    return PreparedBase("p", "base-digest", "float32", 10, 40, source={"hub": "a/b"})


def made_of(recipe: Recipe) -> Made:
    def artifact(variant: str, form: str, key: str) -> Artifact:
        return Artifact(variant, "gguf" if variant != "base" else "base", form, "x", key, 1, 1)

    names = {name: f"d{place}" for place, name in enumerate(recipe.evaluations, start=1)}
    sets = {name: Evaluation(name, f"{name}.json", key, 16, "all", 3, 45, 100) for name, key in names.items()}
    artifacts = {
        "base": [artifact("base", "safetensors", "d"), artifact("base", "gguf", "d")],
        "gguf-Q4_0": [artifact("gguf-Q4_0", "gguf", "dq")],
    }
    tasks = {"mine": Task("mine", "m", "t1", 4, 20)} if recipe.tasks else {}
    return Made(prepared(), artifacts, {}, evaluations=sets, tasks=tasks)


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_recipes_tokens_references_and_rows(form: str, asked: list[tuple[str, str]]) -> None:
    recipe = a_recipe(form)
    assert recipe.digest == RECIPES[form]
    with pytest.raises(Asked):
        tokens.tokenize(recipe, prepared(), None)  # type: ignore[arg-type]
    assert asked == [("tokens", TOKENS[form])]
    made = made_of(recipe)
    keys = reference.reference_keys(recipe, made)
    assert keys == REFERENCES[form]
    compared = digest([*keys.values()]) if len(keys) > 1 else next(iter(keys.values()), None)
    planned = [
        jobs.planned_row(recipe, made, choice, name, compared).key
        for choice in recipe.backends
        for name in ("base", "gguf-Q4_0")
    ]
    assert planned == ROWS[form]


def test_key_of_tasks(asked: list[tuple[str, str]]) -> None:
    with pytest.raises(Asked):
        tokens.tasks(a_recipe("several"), prepared(), None)  # type: ignore[arg-type]
    assert asked == [("tasks", "929b4dcaf3fd9249")]


def test_keys_of_artifacts(asked: list[tuple[str, str]]) -> None:
    recipe = a_recipe()
    variants = {variant.name: variant for variant in recipe.variants}

    def quantized(variant: Variant) -> None:
        source = replace(made_of(recipe).artifacts["gguf-Q4_0"][0], digest="s")
        how = making_of(variant)
        matrix = ImportanceMatrix("imx", path="i") if how.calibration else None
        alone.make_alone(recipe, prepared(), variant, how, None, form="gguf", source=source, looks_at=matrix)  # type: ignore[arg-type]

    plain, weighted, awq = (variants[name] for name in variants if name != "base")
    assert record.artifact_key(prepared(), awq, making_of(awq), ["tok", "float32"]) == "4a7f6fc4691d1c66"
    for run in (
        lambda: base.as_gguf(recipe, prepared(), None),  # type: ignore[arg-type]
        lambda: quantized(plain),
        lambda: quantized(weighted),
    ):
        with pytest.raises(Asked):
            run()
    assert asked == [("artifacts", key) for key in ("b45dd9cbca2e8bda", "e280593ee59cf797", "e0a49e23297d5363")]


def test_keys_of_bases(asked: list[tuple[str, str]]) -> None:
    for more, key in (({}, "4b51dd7e9c8bc3ac"), ({"equivalent": {"hidden": 64}}, "5d4de50a2bd433d6")):
        with pytest.raises(Asked):
            base.prepare(a_recipe(base={"hub": "a/b", **more}), None)  # type: ignore[arg-type]
        assert asked.pop() == ("bases", key)
