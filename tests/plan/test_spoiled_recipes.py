"""Recipes with one thing changed, by a seed, through loading and planning: each is planned, or refused by a short line
that says where; never a traceback, and nothing that could not be done is taken.

`WORKBENCH_MUTANTS=10000` makes it a long run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.fuzz import Mutant, how_many, mutants
from workbench.errors import UserError
from workbench.plan import formats
from workbench.plan.make import make
from workbench.plan.tensors import shape_of
from workbench.recipe.json_schema import schema
from workbench.recipe.load import load
from workbench.records import BaseRequest, to_json
from workbench.worker.base.headers import read

SHORT = 300
"""Characters of an answer."""
SLOW_S = 2.0
SET = {"source": {"text": "words"}, "window": 64, "windows": 4, "score": "second-half"}


def documents(base: Path) -> list[dict[str, Any]]:
    """Recipes that together say everything a recipe can say."""
    whole: dict[str, Any] = {
        "name": "mine",
        "model": "Tiny",
        "base": {"path": str(base), "equivalent": {"hidden": 128, "seed": 0}, "trust_remote_code": False},
        "variants": [
            {"gguf": {"type": "Q4_K_M", "imatrix": True, "encoder": "auto"}, "name": "four"},
            {"awq": {"group_size": 32, "rounding": "compensated", "damping": 0.05, "modules_to_not_convert": ["q"]}},
            {"gptq": {"bits": 4, "group_size": -1, "sym": True, "desc_act": False, "damping": 0.01}},
            {"gguf": "Q8_0"},
        ],
        "calibration": {"source": {"file": "c.jsonl", "field": "text"}, "window": 64, "windows": 4, "seed": 1},
        "evaluation": {"one": SET, "two": {"source": {"module": "pydoc_data.topics"}}},
        "tasks": {"mine": {"file": "t.yaml", "limit": 3, "chat": True}, "arc": {"lm_eval": "arc_easy", "shots": 2}},
        "workload": {"prompt_tokens": [16, 32], "new_tokens": 8, "batch": [1, 4], "repeats": 3, "requests": 2},
        "limits": {"quantize_s": 60, "profile_s": 60.5},
        "backends": {
            "transformers": {"variants": ["base", "awq-*"], "threads": 2, "dtype": "float32"},
            "vllm": {"tensor_parallel": 1, "enforce_eager": True},
            "llamacpp": {"kv_cache": ["f16", "q8_0"], "gpu_layers": -1, "mmap": True},
        },
    }
    config = json.loads((base / "config.json").read_text())
    shaped = {
        "base": {"config": config, "init": "random", "seed": 3},
        "variants": [{"gguf": "Q4_0"}, {"gguf": "IQ4_XS"}],
    }
    package = {"package": "pytest", "file": "pytest/__init__.py"}
    plain = {
        "base": {"path": str(base)},
        "variants": ["awq"],
        "evaluation": {"name": "prose", **SET},
        "backends": ["llamacpp"],
    }
    return [whole, shaped, {**plain, "calibration": {"source": package, "allow_overlap": True}}]


def planned(file: Path) -> str:
    """The plan of a recipe, by the functions of `workbench plan`, without a process of its own for the shape."""
    recipe = load(file)
    equivalent = recipe.base.equivalent.model_dump() if recipe.base.equivalent else None
    request = to_json(BaseRequest(recipe.base.source(recipe.path.parent), equivalent, offline=True))
    shape = shape_of(read(request, lambda *_: None), f"{recipe.path}: base")
    return formats.json_text(make(recipe, memory_bytes=2**33, cuda=False, shape=shape))


NEVER = ("beyond 64 bits", "beyond a float", "1e300", "overflow", "NaN", "infinity", "minus infinity")
"""Numbers that stand for nothing in a recipe."""


def wrongly_taken(mutant: Mutant, text: bytes, checker: Any) -> str:
    """Why a recipe that was planned should have been refused; empty if it may."""
    if mutant.what in NEVER and type(mutant.old) in (int, float):
        return "a number that means nothing"
    if mutant.what in ("a lone surrogate", "control characters"):
        return "what is no text"
    if mutant.path[-1:] == ("name",) and mutant.what in ("300 letters", "a path out"):
        return "a name that names no file"
    data = yaml.safe_load(text)
    return next((error.message for error in checker.iter_errors(data)), "")


def broken(base: Path, folder: Path, count: int, seed: int) -> Iterator[str]:
    """What is wrong with the answers to so many mutants, a line each."""
    checker = jsonschema.Draft202012Validator(schema())
    file = folder / "r.yaml"
    taken, slow = 0, list[str]()
    for mutant in mutants(documents(base), count, seed):
        # JSON is YAML, but for numbers: `NaN` and `1e300` are words there.
        text = mutant.text if mutant.of_text else yaml.safe_dump(json.loads(mutant.text)).encode()
        file.write_bytes(text)
        began = time.process_time()
        try:
            planned(file)
        except UserError as error:
            said = str(error).replace(str(folder), "")
            if not said.isprintable() or len(said) > SHORT:
                yield f"{mutant}: not a short line: {said}"
        except Exception as error:
            yield f"{mutant}: {type(error).__name__}: {error}"
        else:
            taken += 1
            if reason := wrongly_taken(mutant, text, checker):
                yield f"{mutant}: taken: {reason}"
        slow += [str(mutant)] if time.process_time() - began > SLOW_S else []
    print(f"{count} recipes, {taken} planned; more than {SLOW_S} s of a processor took {len(slow)}: {', '.join(slow)}")


def test_a_recipe_that_is_not_spoiled_is_planned(tiny_llama: Path, tmp_path: Path) -> None:
    for document in documents(tiny_llama):
        (tmp_path / "r.yaml").write_text(json.dumps(document))
        assert json.loads(planned(tmp_path / "r.yaml"))


@pytest.mark.slow
def test_a_spoiled_recipe_is_planned_or_refused_by_a_line(tiny_llama: Path, tmp_path: Path) -> None:
    found = list(broken(tiny_llama, tmp_path, how_many(300), seed=15))
    assert not found, "\n".join(found)
