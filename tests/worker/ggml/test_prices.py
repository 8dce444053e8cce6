"""Prices of a matrix's types, against sums over all rows written out."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.worker.ggml import prices
from workbench.worker.ggml.blocks import round_trip

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
TYPES = ("Q8_0", "Q6_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")


def exact(weight: Any, x: Any, g: Any, importance: Any, kind: str) -> float:
    error = torch.from_numpy(round_trip(kind, weight.numpy(), importance)) - weight
    return float(torch.einsum("to,oi,ti->to", g, error, x).square().sum(1).mean()) / 2


@pytest.mark.slow
def test_a_sample_of_rows_tells_what_types_cost() -> None:
    """Gradients differ in size from row to row, inputs from channel to channel, and tokens in both at once."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 256, generator=chance)
    loud = torch.rand(3000, 1, generator=chance) * 4
    x = torch.randn(3000, 256, generator=chance) * torch.logspace(-1, 0.5, 256) * loud
    g = torch.randn(3000, 1024, generator=chance) * torch.rand(1024, generator=chance) * loud
    importance = x.square().mean(0).numpy()
    found = prices.of_linear(weight, x, g, importance, TYPES, round_trip, chance)
    for kind in TYPES:
        assert found[kind] == pytest.approx(exact(weight, x, g, importance, kind), rel=0.15)


def test_few_rows_and_one_input_may_make_most_of_a_price() -> None:
    """As values have it: rows whose gradients are a hundred times those of others, and an input that is larger than
    all others together, so that it is a matter of luck what a type does to a row. Means over seeds are the price, and
    each is near it; rows drawn alike and compared with Q8_0 were off by half."""
    chance = torch.Generator().manual_seed(3)
    weight = torch.randn(512, 256, generator=chance) * torch.rand(512, 1, generator=chance)
    x = torch.randn(500, 256, generator=chance)
    x[:, 7] += 30
    g = torch.randn(500, 512, generator=chance) * torch.rand(512, generator=chance) ** 4
    true = {kind: exact(weight, x, g, None, kind) for kind in TYPES}
    found = [
        prices.of_linear(weight, x, g, None, TYPES, round_trip, torch.Generator().manual_seed(seed))
        for seed in range(20)
    ]
    for kind in TYPES:
        ratios = torch.tensor([each[kind] / true[kind] for each in found])
        assert float((ratios - 1).square().mean().sqrt()) < 0.2, kind
        assert float(ratios.mean()) == pytest.approx(1, abs=0.1), kind


def test_weights_on_a_type_s_grid_cost_nothing_in_it_and_something_in_others() -> None:
    """A base that was a Q8_0 file."""
    chance = torch.Generator().manual_seed(4)
    weight = torch.from_numpy(round_trip("Q8_0", torch.randn(600, 256, generator=chance).numpy()))
    x, g = torch.randn(200, 256, generator=chance), torch.randn(200, 600, generator=chance)
    found = prices.of_linear(weight, x, g, None, TYPES, round_trip, chance)
    assert found["Q8_0"] < 1e-9 * found["Q2_K"]
    for kind in TYPES[1:]:
        assert found[kind] == pytest.approx(exact(weight, x, g, None, kind), rel=0.15), kind


def test_small_matrices_are_priced_by_all_rows() -> None:
    chance = torch.Generator().manual_seed(1)
    weight, x = torch.randn(32, 64, generator=chance), torch.randn(50, 64, generator=chance)
    g = torch.zeros(50, 32)
    g[:, 3] = torch.randn(50, generator=chance)
    found = prices.of_linear(weight, x, g, None, ("Q8_0", "Q4_0"), round_trip, chance)
    for kind, price in found.items():
        assert price == pytest.approx(exact(weight, x, g, None, kind), rel=1e-3)
    assert prices.of_linear(weight, x, 0 * g, None, ("Q8_0", "Q4_0"), round_trip, chance) == {"Q8_0": 0, "Q4_0": 0}


def test_floats_and_blocks_are_read_back_as_they_are_stored() -> None:
    rows = torch.randn(7, 256, generator=torch.Generator().manual_seed(2)).numpy()
    assert abs(round_trip("BF16", rows) - rows).max() < 0.02 and abs(round_trip("F16", rows) - rows).max() < 0.002
    gguf = pytest.importorskip("gguf")
    theirs = gguf.quants.dequantize(
        gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0
    )
    assert (round_trip("Q4_0", rows) == theirs).all()
    assert (round_trip("Q4_K", rows) != round_trip("Q4_K", rows, rows[0] ** 2)).any()
