"""The error feedback of GPTQ (2210.17323): columns are rounded one after the other, and each takes up the error of
those before it, so that little is left of e G e^T, with G = mean(x x^T).

With G = U D U^T, U unit upper triangular, e G e^T is the sum of D_k r_k^2 over columns, r_k the distance of a column's
number from what is wanted of it: its weight and U's share of the errors before it. What a column may be rounded to is
the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.errors import UserError
from workbench.worker import threads

BLOCK = 128
"""Columns between two large products that spread the error (the lazy batches of GPTQ)."""
SUB_BLOCK = 16
"""Columns between two products inside a block, so that a column's own step touches few rows."""


@dataclass(frozen=True)
class Factor:
    """U [in, in] and D [in] of the damped Gram matrix with its inputs in `order`, a permutation [in]; D is 0 for inputs
    that never fire. `damping`: what it took."""

    order: Any
    upper: Any
    spread: Any
    damping: float


def factored(gram: Any, order: Any, damping: float, where: str = "a layer") -> Factor:
    """Factor `gram` [in, in], with `damping` times its mean diagonal added to the diagonal.

    Inputs that never fire get a unit diagonal. If the factorisation fails, the damping is raised tenfold until it
    works; past 1 that is a `UserError`, which begins with `where`.
    """
    return Factor(order, *_factor(gram[order][:, order], damping, where))


Nearest = Callable[[int, Any], Any]
"""`nearest(k, wanted)`: what the k-th column in the order becomes for the numbers wanted of it, both [out]."""
WholeBlock = Callable[[slice, Any, Any, Any, Any], None]
"""`whole_block(columns, target, weight, error, residual)`: round some columns in order at once, each taking up the
errors of those before it among them; `target` is what else is wanted of them. The last two are written, and all are
[columns, out]."""


def feedback(weight: Any, factor: Factor, nearest: Nearest, whole_block: WholeBlock | None = None) -> tuple[Any, Any]:
    """Round the columns of `weight` [in, out] in the factor's order, one by one by `nearest`, or where there is one by
    `whole_block`. Returns the errors W - Q and the residuals r, both [in, out] in that order."""
    with threads.fit_for(weight.numel()):
        return _fed_back(weight, factor, nearest, whole_block)


def _fed_back(weight: Any, factor: Factor, nearest: Nearest, whole_block: WholeBlock | None) -> tuple[Any, Any]:
    """`feedback`, by whatever threads there are."""
    import torch

    inputs, upper = weight.shape[0], factor.upper
    sorted_weight = weight[factor.order]
    error = torch.empty_like(sorted_weight)
    residual = torch.empty_like(sorted_weight)
    for block in range(0, inputs, BLOCK):
        block_end = min(block + BLOCK, inputs)
        target = sorted_weight[block:block_end].clone()
        if block:
            target.addmm_(upper[:block, block:block_end].t(), error[:block])
        if whole_block:
            here = slice(block, block_end)
            whole_block(here, target, sorted_weight[here], error[here], residual[here])
            continue
        for sub in range(block, block_end, SUB_BLOCK):
            sub_end = min(sub + SUB_BLOCK, block_end)
            if sub > block:
                target[sub - block : sub_end - block].addmm_(upper[block:sub, sub:sub_end].t(), error[block:sub])
            for k in range(sub, sub_end):
                wanted = target[k - block]
                if k > sub:
                    wanted.addmv_(error[sub:k].t(), upper[sub:k, k])
                value = nearest(k, wanted)
                torch.sub(wanted, value, out=residual[k])
                torch.sub(sorted_weight[k], value, out=error[k])
    return error, residual


def _factor(gram: Any, damping: float, where: str) -> tuple[Any, Any, float]:
    """U (unit upper triangular), D (vector) with G + damping = U D U^T, and the damping it took."""
    import torch

    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    tried = damping
    while True:
        # Flipping both axes turns the lower factor into the upper one.
        damped = gram.flip(0, 1)
        damped.diagonal().add_(tried * mean)
        damped.diagonal()[dead.flip(0)] = mean
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(torch.isfinite(factor.diagonal()).all()):
            break
        tried = max(tried * 10, 1e-4)
        if tried > 1:
            raise UserError(
                f"{where}: the Gram matrix cannot be factored even with damping 1: the calibration activations are "
                "not usable; take more or other calibration text"
            )
    del damped
    upper = factor.flip(0, 1)
    del factor
    root = upper.diagonal().clone()
    upper.div_(root)
    spread = root * root
    spread[dead] = 0.0
    return upper, spread, tried
