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


def test_a_sample_of_rows_tells_how_types_compare() -> None:
    """Gradients differ in size from row to row, inputs from channel to channel, and tokens in both at once."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 256, generator=chance)
    loud = torch.rand(3000, 1, generator=chance) * 4
    x = torch.randn(3000, 256, generator=chance) * torch.logspace(-1, 0.5, 256) * loud
    g = torch.randn(3000, 1024, generator=chance) * torch.rand(1024, generator=chance) * loud
    importance = x.square().mean(0).numpy()
    found = prices.of_linear(weight, x, g, importance, TYPES, round_trip, chance)
    assert found["Q8_0"] == pytest.approx(exact(weight, x, g, importance, "Q8_0"), rel=1e-3)
    for kind in TYPES:
        assert found[kind] == pytest.approx(exact(weight, x, g, importance, kind), rel=0.1)


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
