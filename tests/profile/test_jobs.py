"""What a job's worker is told."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from tests.fake_driver import NVML, FakeGpu
from workbench.profile import jobs
from workbench.profile.jobs import all_options, environment_of, planned_row
from workbench.quantize.make import Made
from workbench.recipe.load import parse
from workbench.records import Artifact, PreparedBase
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


def test_each_tensor_parallel_size_gets_as_many_gpus_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(uuid=f"GPU-{n}") for n in range(2)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(jobs, "uses_gpu", lambda backend: True)
    recipe = parse(
        {"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}], "backends": {"vllm": {"tensor_parallel": [1, 2, 4]}}},
        Path("r"),
    )
    made = Made(
        PreparedBase("p", "digest", "float32", 10, 40),
        {"base": [Artifact("base", "base", "safetensors", *"pd", 1, 1)]},
        {},
    )
    reasons = [planned_row(recipe, made, choice, "base", None).unsupported for choice in recipe.backends]
    assert reasons == [None, None, "it is to have 4 GPUs, and 2 are visible here"]
    given = [environment_of("vllm", choice.options)["CUDA_VISIBLE_DEVICES"] for choice in recipe.backends[:2]]
    assert given == ["GPU-0", "GPU-0,GPU-1"]
    # Where the engine computes on the processor there is nothing to have.
    monkeypatch.setattr(jobs, "uses_gpu", lambda backend: False)
    assert planned_row(recipe, made, recipe.backends[2], "base", None).unsupported is None
