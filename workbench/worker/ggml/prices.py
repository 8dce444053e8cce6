"""What each of llama.cpp's types does to the model's output, tensor by tensor.

For a linear layer with inputs x, E the error that a type leaves in its weights and g the gradient of -log p(y) at its
output, y drawn from the model itself,

    price = 1/2 mean over tokens of sum_i (g_i (E x)_i)^2

is the divergence in nats that the error causes, to second order: the mean of g g^T is the Hessian (Fisher's) of the
divergence from the model by that output, and what the errors of two rows share has no sign to expect, since llama.cpp
rounds rows apart from each other. Of the output matrix the mean over y is taken exactly: 1/2 mean over tokens of the
variance of (E x)_v over the model's own distribution of v. Prices add up as far as errors of different tensors do not
know of each other.

To make every matrix in every type takes longer than all else. So one type, the reference, which takes no time, is
priced by all rows, and the others by a sample of rows, as multiples of the reference there: what rows have in common
cancels.

Rejected: (g . E x)^2 itself, which comes to the same in the mean over types and takes more tokens to be as sure;
sum_i h_i (E G E^T)_ii of Gram matrices, as if inputs and gradients did not know of each other: it costs as much, and
was three times too high for some queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.worker.calibration.ends import Head

RoundTrip = Callable[[str, Any, Any], Any]
"""A type, rows float32 [n, in] and the importances of their inputs float32 [in] or None, numpy -> the rows as such a
file would hold them, float32 [n, in]."""
Prices = dict[str, float]
"""Type -> nats a token."""

REFERENCES = ("Q8_0", "F16")
"""The type that is priced by all rows: the first that the rows' length admits."""
SHARE = 16
"""One row of so many is looked at for the other types,"""
FEWEST_ROWS = 32
"""but no fewer than these."""


def of_linear(
    weight: Any, inputs: Any, gradients: Any, importance: Any, types: Sequence[str], round_trip: RoundTrip, chance: Any
) -> Prices:
    """Of a matrix [out, in] by `inputs` [tokens, in] and `gradients` [tokens, out] at its output, all float32 torch.

    `importance`: float32 numpy [in], or None. `chance`: a generator that draws the sample of rows.
    """

    def price(kind: str, part: Any, slopes: Any) -> float:
        moved = inputs @ _error(part, kind, importance, round_trip).t()
        return float((slopes * moved).square().sum()) / (2 * len(inputs))

    reference, rows = reference_of(types), sample_of_rows(len(weight), chance).to(weight.device)
    some, slopes = weight[rows], gradients[:, rows]
    whole, parts = price(reference, weight, gradients), {kind: price(kind, some, slopes) for kind in types}
    return scaled(whole, parts, reference)


def of_head(head: Head, hidden: Any, types: Sequence[str], round_trip: RoundTrip) -> Prices:
    """Of the output matrix, by last hidden states [tokens, hidden] before the final norm, and by the rows of the
    likeliest tokens as if there were no others: a row counts by its probability."""
    import torch

    normed = head.norm(hidden)
    probabilities, slopes = head.distribution(head.products(normed))
    count = min(head.rows, max(FEWEST_ROWS, head.rows // SHARE))
    likely = probabilities.sum(0).topk(count).indices.sort().values
    weight = torch.cat(
        [slab[likely[(likely >= first) & (likely < first + len(slab))] - first] for first, slab in head.slabs()]
    )
    probabilities, slopes = probabilities[:, likely], slopes[:, likely]
    probabilities = probabilities / probabilities.sum(1, keepdim=True)

    def price(kind: str) -> float:
        moved = normed @ _error(weight, kind, None, round_trip).t() * slopes
        squares, means = (probabilities * moved.square()).sum(1), (probabilities * moved).sum(1)
        return float((squares - means.square()).mean() / 2)

    return {kind: price(kind) for kind in types}


def of_embedding(
    rows: Any, gradients: Any, embed: Callable[[Any], Any], types: Sequence[str], round_trip: RoundTrip
) -> Prices:
    """Of the embedding by its `rows` that occur, [ids, hidden]; `embed`: what the first layer gets of all tokens if
    these are its rows, [tokens, hidden], and `gradients` there."""
    return {
        kind: float((gradients * embed(_error(rows, kind, None, round_trip))).sum(1).square().mean() / 2)
        for kind in types
    }


def reference_of(types: Sequence[str]) -> str:
    """Which of the types is priced by all rows."""
    return next(kind for kind in REFERENCES if kind in types)


def sample_of_rows(count: int, chance: Any) -> Any:
    """Numbers of the rows that stand for all."""
    import torch

    return torch.randperm(count, generator=chance)[: max(FEWEST_ROWS, count // SHARE)].sort().values


def scaled(whole: float, parts: Prices, reference: str) -> Prices:
    """The price of the reference, and those of the others by how they compare with it on a sample of rows."""
    share = parts[reference]
    return {kind: whole * part / share if share else 0.0 for kind, part in parts.items()}


def _error(rows: Any, kind: str, importance: Any, round_trip: RoundTrip) -> Any:
    import torch

    return torch.from_numpy(round_trip(kind, rows.cpu().numpy(), importance)).to(rows.device) - rows
