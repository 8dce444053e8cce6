"""Rounding that minds what outputs do: a channel's error is made good by the channels still to come.

With x the inputs of a linear layer and g the gradients by its outputs, an error E [out, in] of its weights costs about
tr(Go E Gi E^T) / 2 nats a token, Go = mean(g g^T) and Gi = mean(x x^T): the two factors of K-FAC (1503.05671), which
YAQA (2505.22988) rounds by. With the outputs in blocks, Go = V D V^T, V upper triangular with unit blocks on its
diagonal, that is the sum over blocks b of tr(D_b R_b Gi R_b^T), R_b = E_b + V[before b, b]^T E[before b]. So a block is
rounded as any matrix is, once the errors of those before it have been added to its weights. What is between the outputs
of one block is left out: strong outputs are dealt out over all blocks.

For Gi stands the mean of mean(x x^T) and mean(|g|^2 x x^T), which is GuidedQuant's (2505.07004), scaled to its trace.
What it brings: `benchmarks/output_objective.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from workbench.worker.layers import Group, Layer
from workbench.worker.methods.feedback import factored
from workbench.worker.methods.rounding import Grid, Rounded, quadratic

BLOCKS = 8
"""Blocks of a run of outputs: each is a round of error feedback."""
DAMPING = 1.0
"""Added to the diagonal of Go, as a fraction of its mean: gradients are of one drawn token a position, and noisy."""


@dataclass(frozen=True)
class Piece:
    """Linear layers that are rounded together: those of a group, or where outputs are known, one."""

    group: Group
    gram: Any
    """Of their inputs, float32 [in, in]."""
    gradients: Any = None
    """Of the layer's outputs, in runs [runs, length, length], or None."""


def pieces(layer: Layer, group: Group) -> Iterator[Piece]:
    """What a group is rounded in."""
    if layer.outputs is None:
        yield Piece(group, layer.grams[group.linears[0]])
        return
    for name in group.linears:
        yield Piece(replace(group, linears=(name,)), layer.outputs.inputs[name], layer.outputs.gradients[name])


def by_outputs(
    weight: Any, piece: Piece, group_of: Any, rounded: Callable[[Any], tuple[Rounded, Grid]]
) -> tuple[Rounded, Grid]:
    """Round `weight` [in, out], block by block of its outputs where the piece has their gradients.

    `rounded` makes codes and a grid of some of the channels, [in, some]; `group_of` [in]: the grid's row of each
    input. The error of each channel is that of its inputs alone, e Gi e^T.
    """
    import torch

    if piece.gradients is None:
        return rounded(weight)
    length = piece.gradients.shape[1]
    runs = [_Run(weight, number * length, matrix) for number, matrix in enumerate(piece.gradients)]
    codes, error = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), torch.empty_like(weight)
    scale = zero = torch.empty(0)
    bits, damping = 0, 0.0
    for number in range(max(len(run.blocks) for run in runs)):
        # A block of each run at once: runs know nothing of one another.
        at_work = [run for run in runs if number < len(run.blocks)]
        made, grid = rounded(torch.cat([run.wanted(number) for run in at_work], 1))
        if not bits:
            scale = torch.empty(len(grid.scale), weight.shape[1], device=weight.device)
            zero, bits = torch.empty_like(scale), grid.bits
        here = torch.cat([run.blocks[number] for run in at_work])
        codes[:, here], scale[:, here], zero[:, here] = made.codes, grid.scale, grid.zero
        placed = made.codes.to(weight.dtype).sub_(grid.zero[group_of]).mul_(grid.scale[group_of])
        error[:, here] = weight[:, here] - placed
        for run in at_work:
            run.learn(error[:, run.blocks[number]])
        damping = max(damping, made.damping)
    return Rounded(codes, quadratic(error, piece.gram), damping), Grid(scale, zero, bits)


class _Run:
    """Outputs whose gradients are known together, from `first` on: `weight` [in, out], all there are; `gradients`
    [length, length], as many of them as there are outputs left."""

    def __init__(self, weight: Any, first: int, gradients: Any) -> None:
        import torch

        count = min(len(gradients), weight.shape[1] - first)
        gradients = gradients[:count, :count]
        dealt = _dealt(gradients.diagonal())
        self.weight, self.blocks = weight, [first + block for block in dealt]
        self.upper = factored(gradients, torch.cat(dealt), DAMPING).upper
        self.errors = weight[:, :0]
        """Of the blocks before the next, in their order."""

    def wanted(self, number: int) -> Any:
        """What a block's weights [in, block] should be, after the errors of those before it."""
        import torch

        own, known = self.weight[:, self.blocks[number]], self.errors.shape[1]
        if not known:
            return own
        here = slice(known, known + own.shape[1])
        inside, before = self.upper[here, here], self.upper[:known, here]
        spread = torch.linalg.solve_triangular(inside, before, upper=True, left=False, unitriangular=True)
        return torch.addmm(own, self.errors, spread)

    def learn(self, errors: Any) -> None:
        """Note the next block's errors [in, block]."""
        import torch

        self.errors = torch.cat([self.errors, errors], 1)


def _dealt(strength: Any) -> list[Any]:
    """The outputs, by what they do [outputs], dealt out into blocks; in one where none does anything."""
    import torch

    order = torch.argsort(strength, descending=True, stable=True)
    if not float(strength.amax()) > 0:
        return [order]
    return [order[start::BLOCKS] for start in range(min(BLOCKS, len(order)))]
