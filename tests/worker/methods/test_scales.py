"""AWQ's scales against their definition, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.worker.layers import half, problem
from workbench.worker.layers import Producer
from workbench.worker.methods import awq

torch = pytest.importorskip("torch")

NORM = Producer("norm", "norm")
SHARED = Producer("v", "linear", repeats=2, head_dim=8)


def plain_error(weight: Any, size: int, zero_point: bool) -> Any:
    """W - Q(W) over each group's whole range in four bits."""
    left = np.empty_like(weight)
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        if zero_point:
            low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
            scale = half((high - low) / 15)
            zero = np.clip(np.round(-low / scale), 0, 15)
        else:
            scale, zero = half(np.abs(part).max(0) / 7.5), 8
        left[start : start + size] = part - (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
    return left


def best_scales(weight: Any, gram: Any, size: int, zero_point: bool, repeats: int, head_dim: int) -> Any:
    """importance^a / size^(1 - a) of the exponent that loses the least, if that is less than without scales.

    Of the twenty exponents every second one, then the neighbours of the best.
    """
    weight, gram = weight.double().numpy(), gram.double().numpy()

    def over_heads(values: Any) -> Any:
        table = values.reshape(-1, repeats, head_dim)
        return np.broadcast_to(table.mean(1, keepdims=True), table.shape).reshape(-1)

    importance = np.sqrt(over_heads(np.diag(gram)))
    table = np.abs(weight).reshape(-1, size, weight.shape[1])
    beside = np.sqrt(((table / table.max(1, keepdims=True)) ** 2).mean(2)).reshape(-1)
    beside = over_heads(np.maximum(beside, 1e-4))
    sample = weight[:, :: max(1, weight.shape[1] // 384)]
    tried = {}
    for step in [*range(20), None]:
        scales = np.ones(len(weight))
        if step is not None:
            scales = importance ** (step / 20) / beside ** (1 - step / 20)
            scales = np.clip(scales / np.sqrt(scales.max() * scales.min()), 1 / 256, 256)
        left = plain_error(sample * scales[:, None], size, zero_point) / scales[:, None]
        tried[step] = float(np.einsum("io,ij,jo", left, gram, left)), step, scales
    best = min(range(0, 20, 2), key=lambda step: tried[step][0])
    near = [tried[step] for step in (best, best - 1, best + 1) if 0 <= step < 20]
    return min([*near, tried[None]], key=lambda each: each[0])


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("producer", [NORM, SHARED])
def test_awqs_scales_are_the_best_of_all_exponents(producer: Producer, zero_point: bool) -> None:
    steps = set()
    for seed, outputs in enumerate((24, 24, 24, 800)):
        weight, gram = problem(64, outputs, seed)
        weight *= torch.logspace(-1, seed / 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))][
            :, None
        ]
        options = awq.Options(group_size=16, zero_point=zero_point)
        _, step, scales = best_scales(weight, gram, 16, zero_point, producer.repeats, producer.head_dim)
        found = awq.search_scales(weight, gram, 16, options, producer)
        steps.add(step)
        np.testing.assert_allclose(found.numpy(), scales, rtol=1e-4)
    assert len(steps) > 2, "or one exponent would do"


def test_rounding_over_the_whole_range() -> None:
    weight, _ = problem(64, 20, 3)
    weight[:16] = weight[:16].abs()  # a group without a negative weight
    for zero_point in (True, False):
        found = awq._rounding_error(weight.clone(), 16, awq.Options(group_size=16, zero_point=zero_point))
        np.testing.assert_allclose(found.numpy(), plain_error(weight.double().numpy(), 16, zero_point), atol=2e-6)


def test_scales_stay_within_a_power_of_two_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert awq.LARGEST_SCALE == 256
    monkeypatch.setattr(awq, "LARGEST_SCALE", 2.0)
    weight, gram = problem(64, 24, 1)
    scales = awq.search_scales(weight, gram, 16, awq.Options(group_size=16), NORM)
    assert (float(scales.min()), float(scales.max())) == (0.5, 2.0)


def test_where_no_scales_are_better_there_are_none() -> None:
    """Weights on the grid already: any scale would move them off it."""
    codes = torch.arange(16.0).repeat(4)[:, None].repeat(1, 8)
    assert awq.search_scales(codes, torch.diag(torch.logspace(-2, 2, 64)), 16, awq.Options(group_size=16), NORM) is None
