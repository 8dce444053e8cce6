"""Error feedback against its definition: the factor of the damped matrix, and what is left of e G e^T."""

from __future__ import annotations

from typing import Any

import pytest

from tests.worker.layers import problem
from workbench.errors import UserError
from workbench.worker.methods import feedback

torch = pytest.importorskip("torch")


def test_the_factor_gives_the_damped_matrix_back() -> None:
    _, gram = problem(24, 1, 7)
    gram[5], gram[:, 5] = 0, 0
    upper, spread, damping = feedback._factor(gram.clone(), 0.03, "here")
    mean = float(gram.diagonal().sum()) / 23
    damped = gram.double() + 0.03 * mean * torch.eye(24, dtype=torch.float64)
    damped[5, 5] = mean
    unit = upper.double()
    assert damping == 0.03 and float(spread[5]) == 0.0
    spread = spread.double()
    spread[5] = mean
    torch.testing.assert_close(unit @ torch.diag(spread) @ unit.t(), damped, rtol=1e-4, atol=1e-5)
    assert torch.equal(upper.diagonal(), torch.ones(24)) and not upper.tril(-1).any()
    # A matrix of one input's products takes ten times as much until it can be factored, from 1e-4 on.
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    assert feedback._factor(x.t() @ x - 1e-3 * torch.eye(24), 0.0, "here")[2] in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert feedback._factor(torch.eye(4) - 0.05 * torch.ones(4, 4) * 5, 0.02, "here")[2] == 0.02
    tight = torch.eye(8) + 1.5 * (torch.ones(8, 8) - torch.eye(8))  # its least eigenvalue is -0.5
    assert feedback._factor(tight, 0.06, "here")[2] == pytest.approx(0.6)
    with pytest.raises(UserError, match="^here: the Gram matrix cannot be factored even with damping 1"):
        feedback._factor(tight, 0.2, "here")  # 2 would do


def test_residuals_count_by_the_factor_what_errors_do_by_the_matrix() -> None:
    """e G e^T = sum of D_k r_k^2, and rounding by feedback leaves less of it than each weight to its nearest."""
    weight, gram = problem(200, 7, 3)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = feedback.factored(gram, order, 0.0)

    def to_quarters(_: int, wanted: Any) -> Any:
        return (wanted * 4).round() / 4

    error, residual = feedback.feedback(weight, factor, to_quarters)
    left = ((error.t() @ gram[order][:, order]) * error.t()).sum(1)
    torch.testing.assert_close(factor.spread @ residual.square(), left, rtol=1e-3, atol=1e-6)
    nearest = (weight - to_quarters(0, weight)).t()
    assert float(left.sum()) < 0.9 * float(((nearest @ gram) * nearest).sum())
    rounded = weight[order] - error
    torch.testing.assert_close(rounded, to_quarters(0, rounded), rtol=0, atol=1e-6)
