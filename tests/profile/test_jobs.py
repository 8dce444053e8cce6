"""What a job's worker is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from workbench.profile.jobs import all_options
from workbench.recipe.load import parse
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
