"""What each of llama.cpp's types does to the model's output, tensor by tensor.

For a linear layer with inputs x, E the error that a type leaves in its weights and g the gradient of -log p(y) at its
output, y drawn from the model itself,

    price = 1/2 mean over tokens of sum_i (g_i (E x)_i)^2

is the divergence in nats that the error causes, to second order: the mean of g g^T is the Hessian (Fisher's) of the
divergence from the model by that output, and what the errors of two rows share has no sign to expect, since llama.cpp
rounds rows apart from each other. Of the output matrix the mean over y is taken exactly: 1/2 mean over tokens of the
variance of (E x)_v over the model's own distribution of v. Prices add up as far as errors of different tensors do not
know of each other.

To make every matrix in every type takes longer than all else, so types are priced on a sample of rows. Few rows make
most of a price, so a row is drawn as often as what rounding at random by the step d of a block would cost there,

    sum_j (mean over tokens of g_i^2 x_j^2) d_ij^2,

and counts by its inverse. On the default model 64 rows of a matrix tell its prices to 5 to 10 %.

Rejected: (g . E x)^2 itself, which comes to the same in the mean over types and takes more tokens to be as sure;
sum_i h_i (E G E^T)_ii of Gram matrices, as if inputs and gradients did not know of each other: it costs as much, and
was three times too high for some queries and keys; rows drawn alike, compared with what an exactly known type (Q8_0)
costs on them: with as many rows 30 to 70 % off in queries, keys and values, where one input is larger than all others
and how it happens to be rounded in either type decides.
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

ROWS = 64
"""Rows of a matrix that are looked at, whatever its size."""
BLOCK = 32
"""Weights that share a step, in most types."""
HEAD_SHARE, FEWEST_ROWS = 16, 32
"""Of the output matrix one row in so many is looked at, but no fewer than these."""


def of_linear(
    weight: Any, inputs: Any, gradients: Any, importance: Any, types: Sequence[str], round_trip: RoundTrip, chance: Any
) -> Prices:
    """Of a matrix [out, in] by `inputs` [tokens, in] and `gradients` [tokens, out] at its output, all float32 torch.

    `importance`: float32 numpy [in], or None. `chance`: a generator that draws the sample of rows.
    """

    rows, counts = sample_of_rows(_at_random(weight, inputs, gradients), chance)
    some, slopes = weight[rows], gradients[:, rows]

    def price(kind: str) -> float:
        moved = inputs @ _error(some, kind, importance, round_trip).t()
        return float(((slopes * moved).square_().sum(0) * counts).sum()) / (2 * len(inputs))

    return {kind: price(kind) for kind in types}


def of_head(head: Head, hidden: Any, types: Sequence[str], round_trip: RoundTrip) -> Prices:
    """Of the output matrix, by last hidden states [tokens, hidden] before the final norm, and by the rows of the
    likeliest tokens as if there were no others: a row counts by its probability."""
    import torch

    normed = head.norm(hidden)
    said = sum(head.distribution(head.products(part))[0].sum(0) for part in normed.split(head.chunk))
    count = min(head.rows, max(FEWEST_ROWS, head.rows // HEAD_SHARE))
    likely = torch.as_tensor(said).topk(count).indices.sort().values
    weight = torch.cat(
        [slab[likely[(likely >= first) & (likely < first + len(slab))] - first] for first, slab in head.slabs()]
    )
    bias = 0.0 if head.bias is None else head.bias[likely]
    probabilities, slopes = head.distribution(normed @ weight.t() + bias)

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


def sample_of_rows(sizes: Any, chance: Any) -> tuple[Any, Any]:
    """Numbers of the rows that stand for all, ascending, and for how many rows each does; `sizes`: float32 [rows].

    The sum over all rows of what is about proportional to `sizes` is that over these, times what they stand for. They
    lie under equal steps along the running sum of sizes, from a drawn start (systematic sampling with probabilities
    proportional to size), so a row of more than a step is among them for sure. All rows where they are few.
    """
    import torch

    some = sizes.nonzero()[:, 0]
    if len(some) <= ROWS:
        return some, torch.ones(len(some), device=sizes.device)
    running = sizes[some].cpu().double().cumsum(0)
    step = float(running[-1]) / ROWS
    points = (torch.arange(ROWS, dtype=torch.float64) + torch.rand(1, generator=chance, dtype=torch.float64)) * step
    drawn = torch.searchsorted(running, points).clamp_(max=len(some) - 1)
    places, times = torch.unique_consecutive(drawn.to(sizes.device), return_counts=True)
    return some[places], times * step / sizes[some[places]]


def _at_random(weight: Any, inputs: Any, gradients: Any) -> Any:
    """What rounding at random costs each row of [out, in], in no unit: float32 [out]."""
    steps = weight.abs()
    if weight.shape[1] % BLOCK == 0:
        steps = steps.view(len(weight), -1, BLOCK).amax(2).repeat_interleave(BLOCK, dim=1)
    return ((gradients.square().t() @ inputs.square()) * steps.square_()).sum(1)


def _error(rows: Any, kind: str, importance: Any, round_trip: RoundTrip) -> Any:
    import torch

    return torch.from_numpy(round_trip(kind, rows.cpu().numpy(), importance)).to(rows.device) - rows
