"""How many of a machine's GPUs a recipe's steps ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from workbench.cluster.schedule import Place
from workbench.cluster.steps import Wanted, steps_of
from workbench.recipe.load import parse

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
