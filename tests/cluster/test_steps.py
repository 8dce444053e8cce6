"""How many of a machine's GPUs a recipe's steps ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.cluster.schedule import Place
from workbench.cluster.steps import Wanted, steps_of
from workbench.profile.beside import ENDPOINT
from workbench.profile.endpoint import planned, wish_of
from workbench.recipe.load import parse
from workbench.serving.address import address_of

CALIBRATION: dict[str, Any] = {"source": {"text": "words"}}


@pytest.mark.parametrize(("said", "gpus"), [({}, 1), ({"devices": "auto"}, 1), ({"devices": 4}, 4)])
def test_the_calibration_pass_asks_for_the_devices_that_share_it(said: dict[str, Any], gpus: int) -> None:
    """And a job for the most GPUs that its engine spreads a model over."""
    recipe = parse(
        {
            "base": {"path": "x"},
            "variants": ["awq"],
            "calibration": CALIBRATION | said,
            "backends": {"vllm": {"tensor_parallel": [1, 2]}, "transformers": {}},
        },
        Path("r.yaml"),
    )
    asked = steps_of(recipe, Wanted(), [Place("a", "h100", gpus=8)], lambda kind, engine, variant: 1.0)
    assert [each.step.gpus for each in asked if each.work == "pass"] == [gpus]
    wide = {engine: each.step.gpus for each in asked for engine, _ in each.jobs}
    assert wide == {"vllm": 2, "transformers": 1}


def test_every_endpoint_of_a_recipe_is_a_job_by_the_name_of_its_row() -> None:
    """By the variant that it serves, or else by its own, as the row has it (`profile/endpoint.py`)."""
    recipe = parse(
        {
            "base": {"path": "x"},
            "variants": [{"gguf": "Q8_0"}],
            "backends": {"llamacpp": {}},
            "endpoints": {
                "mine": {"url": "http://127.0.0.1:1/v1"},
                "ours": {"url": "http://127.0.0.1:2/v1", "variant": "gguf-Q8_0"},
            },
        },
        Path("r.yaml"),
    )
    *_, last = steps_of(recipe, Wanted(), [Place("a", "desk")], lambda kind, engine, variant: 1.0)
    assert last.jobs == ((ENDPOINT, "mine"), (ENDPOINT, "gguf-Q8_0"))
    address, wish = address_of("http://127.0.0.1:1/v1"), wish_of((1,), (), "poisson", (), 8, 4, 10)
    assert planned("mine", address, wish, None).artifact.variant == "mine"
