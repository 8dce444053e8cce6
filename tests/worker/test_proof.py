"""The comparison of two engines' logits: by hand, at its limits, and over padded vocabularies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workbench.worker.proof import SAME_WEIGHTS_NATS, compare, ids_over


def test_the_divergence_is_the_formulas() -> None:
    first, second = torch.tensor([[0.0, math.log(3)]]), np.array([[0.0, 0.0]], dtype=np.float32)
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    found = compare(first, second, 0.1)
    assert found.kld_nats == pytest.approx(by_hand, rel=1e-6) and not found.same
    assert compare(first, second, 0.2).same


def test_a_constant_and_padding_say_nothing() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([logits + 3, torch.full((5, 2), 100.0)], -1)
    assert compare(logits, padded, SAME_WEIGHTS_NATS).same


def test_what_is_no_number_is_no_proof() -> None:
    logits = torch.zeros(2, 3)
    assert not compare(logits, logits * torch.nan, 1e9).same
    with pytest.raises(ValueError, match="2 and of 1 positions"):
        compare(logits, logits[:1], 1.0)


def test_ids_are_spread_and_inside() -> None:
    ids = ids_over(1000)
    assert len(set(ids)) == 64 and min(ids) < 50 and 950 < max(ids) < 1000
    assert set(ids_over(2)) == {0, 1}
