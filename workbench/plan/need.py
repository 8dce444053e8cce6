"""What one variant needs in one engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from workbench.gpus import too_few
from workbench.recipe.choices import BackendChoice, first_loaded, form_for, limits_of, method_of
from workbench.records import Artifact, Variant
from workbench.shape import Sequences, Shape, Stored
from workbench.worker.backends import backend_named

CUDA_CONTEXT_BYTES = 600e6
"""What a CUDA context and its libraries take of a GPU's memory, by common report; not measured here."""


@dataclass(frozen=True)
class Need:
    """One variant in one engine. Bytes; None where the pair cannot run."""

    variant: str
    backend: str
    options: dict[str, Any]
    disk_bytes: int
    """All weight tensors as stored: what `Artifact.disk_bytes` will be."""
    bits_per_weight: float
    weights_bytes: int | None = None
    """What the weights take in the engine's memory."""
    kv_cache_bytes: int | None = None
    workspace_bytes: int | None = None
    runtime_bytes: int | None = None
    need_bytes: int | None = None
    """The sum of the four."""
    fits: bool | None = None
    fits_context_tokens: int | None = None
    """The longest context that would fit, where this one does not."""
    fallbacks: tuple[str, ...] = ()
    """Tensors that get another type than the mixture means for them."""
    notes: tuple[str, ...] = ()
    unsupported: str | None = None
    devices: int = 1
    """Over how many devices it is spread."""


@dataclass(frozen=True)
class Plan:
    """A recipe's needs on a memory of a given size."""

    recipe: str
    model: str
    parameters: int
    context_tokens: int
    """Prompt and new tokens of the longest sequence."""
    batch: int
    """The largest."""
    device: str
    """`cpu` or `cuda`."""
    memory_bytes: int
    disk_bytes: int
    """Bytes of everything the recipe makes, the prepared base and the conversion included."""
    free_disk_bytes: int
    needs: tuple[Need, ...]
    """Each at the point that needs most."""
    points: tuple[Sequences, ...] = ()
    notes: tuple[str, ...] = ()
    """Where it knows less than it might, and what of the recipe is odd."""

    def __str__(self) -> str:
        from workbench.plan.formats import terminal

        return terminal(self)


def need_of(
    shape: Shape,
    variant: Variant,
    choice: BackendChoice,
    load: Sequences,
    cuda: bool,
    held: Mapping[str, Stored] | None = None,
    own: bool = False,
) -> Need:
    """What one variant needs in one engine for those sequences at once, and to score windows. `held`: by format, what
    headers say of a variant that others made; `own`: on this machine, with its GPUs."""
    backend = backend_named(choice.name)
    form = first_loaded([*held], choice.name) if held else form_for(variant, choice.name)
    stored = held[form] if held else _stored(variant.method, json.dumps(variant.options), shape, form)
    bits = round(stored.disk_bytes * 8 / shape.parameters, 4)
    need = Need(variant.name, choice.name, choice.options, stored.disk_bytes, bits, fallbacks=stored.fallbacks)
    chosen = backend.Options(**choice.options)
    most = getattr(backend, "MOST_SEQUENCES", load.batch)
    reason = (
        stored.refused
        or backend.unsupported(Artifact(variant.name, variant.method, form, "", "", 0, 0), cuda)
        or limits_of(variant).get(choice.name)
        or stored.limits.get(choice.name)
        or backend.refuses(chosen, form, cuda)
        or (f"{choice.name} takes {most} sequences at once at most" if load.batch > most else None)
    )
    if reason:
        return replace(need, unsupported=reason)
    found = backend.needs(shape, form, stored, load, chosen, cuda)
    if own and cuda and (missing := too_few(found.devices)):
        return replace(need, unsupported=missing)
    runtime = CUDA_CONTEXT_BYTES * found.devices if cuda else found.runtime
    notes = [*stored.notes, *found.notes]
    if shape.sliding_window:
        notes.insert(0, f"layers with a sliding window of {shape.sliding_window} may keep less than this KV cache")
    return replace(
        need,
        weights_bytes=int(found.weights),
        kv_cache_bytes=int(found.kv_cache),
        workspace_bytes=int(found.workspace),
        runtime_bytes=int(runtime),
        need_bytes=int(found.weights + found.kv_cache + found.workspace + runtime),
        notes=tuple(notes),
        devices=found.devices,
    )


@lru_cache(maxsize=1000)
def _stored(method: str, options: str, shape: Shape, form: str) -> Stored:
    """What a variant's files hold: the same for every engine, point and context that is tried. `options`: as JSON."""
    how, chosen = method_of(Variant("", method, json.loads(options)))
    return how.sizes(shape, chosen, form)
