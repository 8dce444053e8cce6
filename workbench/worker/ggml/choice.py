"""Which type each tensor gets, so that a file of some size diverges least from its base.

Prices add up (`prices.py`), so what is looked for is one type a tensor with the least sum of prices within a number of
bytes. Of each tensor only the types on the lower hull of prices over bytes count: from the smallest mixture on, that
step up is taken next which saves most a byte, wherever it is. What is too little for the next step goes to the steps
that still fit. Every mixture on the way is the best of its size; the last one lacks less than a step.

Each tensor is chosen for alone: llama.cpp multiplies with one at a time, vLLM gets GGUF files de-quantized, and the
experts of a layer are one tensor.
"""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from workbench.errors import UserError
from workbench.shape import NamedShape, Traits
from workbench.sizes import mib_text, parse_size
from workbench.worker.ggml.mixtures import BLOCKS, FALLBACK, is_quantized, tensor_bytes, types_of

TYPES = tuple(kind for kind in BLOCKS if kind != "F32")
"""What a tensor may become, the widest first."""
BLIND = ("token_embd.weight", "output.weight")
"""What no importance matrix speaks of."""
NEEDS_IMPORTANCE = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""Types that llama.cpp makes blindly of no tensor, or badly."""


@dataclass(frozen=True)
class Budget:
    """How large a file may be, by one of the first three, and what it may be made of."""

    size: str | None = None
    """Of the whole file, as people write it."""
    bits: float | None = None
    """A weight, on average."""
    like: str | None = None
    """The weights of this mixture."""
    types: tuple[str, ...] = ()
    """The only ones to choose from; all if empty."""
    keep: Mapping[str, str] = field(default_factory=dict)
    """Pattern of tensors' names -> their type."""

    @property
    def text(self) -> str:
        """It in the recipe's words."""
        return next(
            f"{name}: {value}" for name in ("size", "bits", "like") if (value := getattr(self, name)) is not None
        )

    def weight_bytes(self, tensors: Sequence[NamedShape], traits: Traits, other_bytes: int = 0) -> int:
        """What it leaves for the weights of a file with `other_bytes` of metadata and gaps."""
        if self.size is not None:
            return parse_size(self.size, "size") - other_bytes
        if self.bits is not None:
            return int(self.bits * sum(tensor.weights for tensor in tensors) / 8)
        types, _ = types_of(str(self.like), tensors, traits, imatrix=True)
        return sum(tensor_bytes(types[tensor.name], tensor) for tensor in tensors)


class Place(NamedTuple):
    """A type that a tensor may have: what it takes and what it does to the output."""

    size_bytes: int
    price: float
    kind: str


@dataclass(frozen=True)
class Choice:
    """A mixture, and what is expected of it."""

    types: dict[str, str]
    """Tensor -> type, of all that a mixture has a say in."""
    size_bytes: int
    """All weights, the others included."""
    divergence: float
    """The sum of prices: nats a token."""


def types_for(columns: int, weighted: bool, types: Collection[str] = TYPES) -> list[str]:
    """Of `types`, those of a matrix with rows of that length; `weighted`: with importances."""
    return [
        kind
        for kind in TYPES
        if kind in types and columns % BLOCKS[kind][0] == 0 and (weighted or kind not in NEEDS_IMPORTANCE)
    ]


def allowed(tensors: Sequence[NamedShape], types: Collection[str], keep: Mapping[str, str]) -> dict[str, list[str]]:
    """Tensor -> the types it may have, of all that a mixture has a say in.

    A tensor that can have none of `types` gets what llama.cpp takes instead. `keep`: pattern of names -> the type of
    those. Raises `UserError` for patterns that contradict each other, that
    name nothing, or a type that a tensor cannot have; and where `types` leave a tensor none.
    """
    found: dict[str, list[str]] = {}
    names = [tensor.name for tensor in tensors if is_quantized(tensor)]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            some = ", ".join(dict.fromkeys([*BLIND[:1], *names[:2]]))
            raise UserError(f"keep: no tensor is called '{pattern}'; there are {some} and others")
    for tensor in (each for each in tensors if is_quantized(each)):
        columns, weighted = tensor.shape[-1], tensor.name not in BLIND
        kept = {kind: pattern for pattern, kind in keep.items() if fnmatch.fnmatchcase(tensor.name, pattern)}
        if len(kept) > 1:
            told = " and ".join(f"'{pattern}' {kind}" for kind, pattern in kept.items())
            raise UserError(f"keep: {told} contradict each other: both name {tensor.name}")
        fallbacks = [] if kept else [FALLBACK[kind] for kind in types if kind in FALLBACK]
        found[tensor.name] = types_for(columns, weighted, kept or types) or types_for(columns, weighted, fallbacks)
        if not found[tensor.name]:
            what, asked = ("keep", ", ".join(kept)) if kept else ("types", ", ".join(types))
            why = f"its rows are of {columns}" + ("" if weighted else ", and no importance matrix speaks of it")
            able = ", ".join(types_for(columns, weighted))
            raise UserError(f"{what}: {tensor.name} cannot be {asked}: {why}. It can be {able}")
    return found


def range_of(tensors: Sequence[NamedShape], may: Mapping[str, Sequence[str]]) -> tuple[int, int]:
    """Bytes of the smallest and of the largest mixture of the types that tensors may have (`allowed`)."""
    sizes = [[tensor_bytes(kind, tensor) for kind in may.get(tensor.name, ("F32",))] for tensor in tensors]
    return sum(map(min, sizes)), sum(map(max, sizes))


def refusal(budget: Budget, size_bytes: int, smallest: int, largest: int) -> str | None:
    """Why no mixture has that many bytes of weights, if none has."""
    if smallest <= size_bytes <= largest:
        return None
    return (
        f"{budget.text} leaves {mib_text(size_bytes)} for weights, and {mib_text(smallest)} to {mib_text(largest)} are "
        "possible with these types"
    )


def choose(
    tensors: Sequence[NamedShape],
    may: Mapping[str, Sequence[str]],
    prices: Mapping[str, Mapping[str, float]],
    size_bytes: int,
) -> Choice:
    """The mixture with the least sum of prices within `size_bytes` of weights, which `range_of` admits.

    A tensor without prices gets the widest type of 8 bits or fewer that it may have: what it does is not known. Raises
    `UserError` if all that is too much.
    """
    hulls: dict[str, list[Place]] = {}
    for tensor in tensors:
        if tensor.name not in may:
            hulls[tensor.name] = [Place(tensor_bytes("F32", tensor), 0.0, "F32")]
            continue
        priced = prices.get(tensor.name, {})
        places = [Place(tensor_bytes(k, tensor), priced[k], k) for k in may[tensor.name] if k in priced]
        hulls[tensor.name] = _hull(places or [_unpriced(tensor, may[tensor.name])])
    at = dict.fromkeys(hulls, 0)
    smallest = sum(hull[0].size_bytes for hull in hulls.values())
    if smallest > size_bytes:
        raise UserError(f"{mib_text(size_bytes)} of weights: {mib_text(smallest)} is the least with these types")
    left = size_bytes - smallest
    steps = [_step(name, hull, 0) for name, hull in hulls.items() if hull[1:]]
    heapq.heapify(steps)
    while steps:
        _, name, place, more = heapq.heappop(steps)
        if more > left:
            continue
        at[name], left = place, left - more
        if hulls[name][place + 1 :]:
            heapq.heappush(steps, _step(name, hulls[name], place))
    chosen = {name: hulls[name][place] for name, place in at.items()}
    return Choice(
        {name: place.kind for name, place in chosen.items() if name in may},
        sum(place.size_bytes for place in chosen.values()),
        sum(place.price for place in chosen.values()),
    )


def _unpriced(tensor: NamedShape, may: Sequence[str]) -> Place:
    kind = next((each for each in may if each not in ("F16", "BF16")), may[0])
    return Place(tensor_bytes(kind, tensor), 0.0, kind)


def _step(name: str, hull: Sequence[Place], at: int) -> tuple[float, str, int, int]:
    """The next step up of a tensor: its gain a byte (negated, for the heap), whose, to where, its bytes."""
    here, there = hull[at], hull[at + 1]
    more = there.size_bytes - here.size_bytes
    return (there.price - here.price) / more, name, at + 1, more


def _hull(places: Sequence[Place]) -> list[Place]:
    """Those on the lower convex hull of price over bytes, the smallest first."""
    hull: list[Place] = []
    for place in sorted(places):
        if hull and place.price >= min(each.price for each in hull):
            continue
        while len(hull) > 1 and _slope(hull[-2], place) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(place)
    return hull


def _slope(one: Place, other: Place) -> float:
    return (other.price - one.price) / (other.size_bytes - one.size_bytes)
