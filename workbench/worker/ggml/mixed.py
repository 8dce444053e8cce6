"""A GGUF file of some size whose tensors have the types that cost its model's output least.

The file is llama.cpp's own quantizer's, told the type of each tensor; beside it lies what tells `llama-quantize` the
same (`--tensor-type-file`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workbench.disk import write_whole
from workbench.errors import UserError, WorkFailed
from workbench.records import MadeVariant, Priced, from_json, to_json
from workbench.shape import NamedShape
from workbench.worker import Progress
from workbench.worker.ggml import compensate, lost
from workbench.worker.ggml.choice import TYPES, Budget, Choice, allowed, choose, range_of, refusal
from workbench.worker.ggml.encode import traits_of
from workbench.worker.ggml.index import entries
from workbench.worker.ggml.mixtures import types_of
from workbench.worker.ggml.quantizer import pattern_of, ready, run_quantizer

ADDED_BYTES, ALIGNMENT = 256, 32
"""What the quantizer adds to the metadata at the most, and to what multiple of bytes each tensor is filled up."""
TYPE_FILE = ".tensor-types.txt"
"""What the file beside a GGUF file is called, behind its name."""
MIXTURES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "F16": "Q8_0", "BF16": "Q8_0"}
"""What llama.cpp calls a mixture of mostly such a type, where it has no name of the type's own."""


@dataclass(frozen=True)
class Request:
    """What the worker is asked: what it needs of a `VariantRequest`, and the arguments of a `Making`."""

    out: str
    source: str
    imatrix: str
    prices: str
    grams: str | None = None
    budget: Budget = field(default_factory=Budget)
    threads: int | None = None


def make(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: choose types within the budget and write the file. Returns `MadeVariant`.

    Its `provenance` has the `choice`: the `budget`, the predicted `divergence` (nats a token), that of the mixture it
    is `like`; and in `tensor_prices` what each costs. Raises `UserError` for a size that cannot be.
    """
    ready()
    import gguf

    request: Request = from_json(Request, payload)
    priced: Priced = from_json(Priced, json.loads(Path(request.prices).read_text(encoding="utf-8")))
    held, budget = entries(request.source), request.budget
    tensors = [NamedShape(each.name, tuple(size for size in reversed(each.shape) if size > 1)) for each in held]
    traits = traits_of(gguf.GGUFReader(request.source))
    others = held[0].offset + ADDED_BYTES + ALIGNMENT * len(held)
    may = allowed(tensors, budget.types or TYPES, budget.keep)
    size_bytes = budget.weight_bytes(tensors, traits, others)
    if problem := refusal(budget, size_bytes, *range_of(tensors, may)):
        raise UserError(problem)
    if request.grams:
        priced = replace(priced, tensors=compensate.repriced(priced.tensors, Path(request.grams)))
    choice = choose(tensors, may, priced.tensors, size_bytes)
    out = Path(request.out)
    try:
        run_quantizer(
            request.source,
            request.out,
            _mixture(choice, tensors),
            request.imatrix,
            request.threads,
            progress=compensate.first_step(request.grams, progress),
            types=choice.types,
        )
        chosen = compensate.told(request.source, request.out, request.grams, progress)
    except UserError:
        out.unlink(missing_ok=True)
        raise
    made = entries(request.out)
    other = {each.name: each.kind for each in made if choice.types.get(each.name, each.kind) != each.kind}
    if other:
        raise WorkFailed(f"llama.cpp made {len(other)} tensors of other types than asked: {other}")
    lines = "".join(f"{pattern_of(name)}={kind.lower()}\n" for name, kind in choice.types.items())
    write_whole(out.with_name(out.name + TYPE_FILE), lines)
    prices = {name: priced.tensors[name][kind] for name, kind in choice.types.items() if name in priced.tensors}
    told: dict[str, object] = {"budget": budget.text, "divergence": choice.divergence}
    if budget.like:
        told["like"] = predicted(types_of(budget.like, tensors, traits, imatrix=True)[0], priced)
    return to_json(
        MadeVariant(
            {each.name: each.kind for each in made},
            disk_bytes=sum(each.size_bytes for each in made),
            warnings=lost.warnings(request.source, request.out),
            notes=[f"predicted divergence {choice.divergence:.4f}; {_counted(choice)}"],
            provenance={"encoder": {"name": "llamacpp", "device": "cpu"}, "choice": told, "tensor_prices": prices}
            | chosen,
        )
    )


def predicted(types: Mapping[str, str], priced: Priced) -> float:
    """The sum of prices of a mixture, nats a token."""
    return sum(prices[types[name]] for name, prices in priced.tensors.items() if types.get(name) in prices)


def _mixture(choice: Choice, tensors: Sequence[NamedShape]) -> str:
    """What a file is called in its metadata: by the type of most of its weights."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.name in choice.types:
            weights[choice.types[tensor.name]] += tensor.weights
    most = max(weights, key=lambda kind: (weights[kind], kind))
    return MIXTURES.get(most, most)


def _counted(choice: Choice) -> str:
    """`90 x Q4_K, 60 x Q5_K`, the widest type first."""
    counts = Counter(choice.types.values())
    return ", ".join(f"{counts[kind]} x {kind}" for kind in TYPES if kind in counts)
