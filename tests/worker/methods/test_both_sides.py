"""Error feedback over outputs: what is left of tr(Go E Gi E^T)."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.worker.layers import Group
from workbench.worker.methods import both_sides, rounding
from workbench.worker.methods.both_sides import Piece, by_outputs
from workbench.worker.methods.feedback import factored

torch = pytest.importorskip("torch")


def correlated(size: int, seed: int) -> Any:
    """A Gram matrix [size, size] of inputs that have much in common."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size // 4, generator=chance) @ torch.randn(size // 4, size, generator=chance)
    x += 0.3 * torch.randn(4 * size, size, generator=chance)
    return x.t() @ x / len(x)


def rounded_with(gram: Any, group_of: Any, size: int = 32, bits: int = 4) -> Any:
    """A function that rounds channels with error feedback."""
    factor = factored(gram, torch.arange(len(gram)), 0.01)

    def rounded(weight: Any) -> Any:
        grid = rounding.search_grid(weight, gram, size, bits, symmetric=True)
        return rounding.compensate(weight, gram, grid, group_of, factor.order, 0.01, factor=factor), grid

    return rounded


def both(weight: Any, made: Any, grid: Any, group_of: Any, gram: Any, gradients: Any) -> float:
    """tr(Go E Gi E^T)."""
    error = (weight - (made.codes.float() - grid.zero[group_of]) * grid.scale[group_of]).t()
    return float((gradients @ error @ gram * error).sum())


def test_less_is_left_than_by_inputs_alone_and_the_error_told_is_that_of_inputs() -> None:
    gram, gradients = correlated(64, 1), correlated(48, 2)
    weight, group_of = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)), torch.arange(64) // 32
    rounded = rounded_with(gram, group_of)
    group = Group(("o",), None)
    plain, plain_grid = by_outputs(weight, Piece(group, gram), group_of, rounded)
    made, grid = by_outputs(weight, Piece(group, gram, gradients[None]), group_of, rounded)
    left = [both(weight, *each, group_of, gram, gradients) for each in ((made, grid), (plain, plain_grid))]
    assert left[0] < 0.8 * left[1]
    error = weight - (made.codes.float() - grid.zero[group_of]) * grid.scale[group_of]
    assert torch.allclose(made.error, (error * (gram @ error)).sum(0), rtol=1e-4)
    assert grid.bits == 4 and made.damping == 0.01


def test_outputs_that_are_independent_are_rounded_as_if_each_were_alone() -> None:
    gram, group_of = correlated(64, 1), torch.arange(64) // 32
    weight = torch.randn(64, 20, generator=torch.Generator().manual_seed(3))
    rounded = rounded_with(gram, group_of)
    plain, _ = by_outputs(weight, Piece(Group(("o",), None), gram), group_of, rounded)
    for gradients in (torch.diag(torch.arange(1.0, 21.0)), torch.zeros(20, 20)):
        made, _ = by_outputs(weight, Piece(Group(("o",), None), gram, gradients[None]), group_of, rounded)
        assert torch.equal(made.codes, plain.codes)


def test_runs_of_outputs_are_rounded_apart() -> None:
    gram, group_of = correlated(64, 1), torch.arange(64) // 32
    weight = torch.randn(64, 20, generator=torch.Generator().manual_seed(3))
    gradients = torch.stack([correlated(12, 4), torch.nn.functional.pad(correlated(8, 5), (0, 4, 0, 4))])
    rounded, group = rounded_with(gram, group_of), Group(("o",), None)
    made, grid = by_outputs(weight, Piece(group, gram, gradients), group_of, rounded)
    for rows, own in ((slice(0, 12), gradients[0]), (slice(12, 20), gradients[1, :8, :8])):
        alone, alone_grid = by_outputs(weight[:, rows], Piece(group, gram, own[None]), group_of, rounded)
        assert torch.equal(made.codes[:, rows], alone.codes) and torch.equal(grid.scale[:, rows], alone_grid.scale)


def test_strong_outputs_are_dealt_out() -> None:
    blocks = both_sides._dealt(torch.arange(20.0))
    assert len(blocks) == both_sides.BLOCKS
    assert [int(block[0]) for block in blocks] == [19, 18, 17, 16, 15, 14, 13, 12]
    assert sorted(torch.cat(blocks).tolist()) == list(range(20))
    assert len(both_sides._dealt(torch.ones(3))) == 3
    assert len(both_sides._dealt(torch.zeros(20))) == 1
