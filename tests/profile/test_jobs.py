"""What a job's worker is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from workbench.profile.jobs import all_options, planned_row
from workbench.quantize.make import Made
from workbench.recipe.load import parse
from workbench.records import PreparedBase
from workbench.worker.backends import BACKENDS, backend_named


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_the_recipe_does_not_list_is_told_every_option(backend: str, trust: bool) -> None:
    base = {"path": "x", "trust_remote_code": trust}
    recipe = parse({"base": base, "variants": [{"gguf": "Q4_0"}], "backends": {backend: {}}}, Path("r.yaml"))
    (listed,) = recipe.backends
    told = all_options(recipe, backend, {})
    assert told == all_options(recipe, backend, listed.options)
    assert [*told] == [field.name for field in dataclasses.fields(backend_named(backend).Options)]
    assert told.get("trust_remote_code", trust) is trust


def test_a_base_that_was_quantized_before_is_told_in_every_row() -> None:
    recipe = parse(
        {"base": {"path": "x.gguf"}, "variants": [{"gguf": "Q4_0"}], "backends": {"llamacpp": {}}}, Path("r")
    )
    for types, told in ((["Q4_K", "Q6_K"], 1), ([], 0)):
        base = PreparedBase("p", "digest", "float32", 10, 40, quantized_types=types)
        for variant in ("base", "gguf-Q4_0"):
            row = planned_row(recipe, Made(base, {}, {}), recipe.backends[0], variant, None)
            assert row.base_types == types
            assert sum("de-quantized from Q4_K, Q6_K" in text for text in row.warnings) == told
