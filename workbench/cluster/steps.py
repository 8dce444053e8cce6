"""A recipe cut into steps that machines can take: what is made once, each variant, and what is measured.

base and tokens -> the calibration pass -> each variant -> jobs, on one machine of each kind
                -> the base's distributions ----------^
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from workbench.cluster.schedule import Place, Step
from workbench.profile.beside import ENDPOINT
from workbench.profile.jobs import devices_of, pairs_of
from workbench.quantize.calibrated import pass_devices
from workbench.quantize.make import to_carry
from workbench.recipe.choices import making_of
from workbench.recipe.load import Recipe
from workbench.worker.methods import BASE

Work = Literal["tokens", "pass", "make", "refer", "measure"]

BLOCK = 4
"""Jobs that a machine without a GPU takes at once, so that it can interleave their rounds (`profile/rounds.py`)."""
FIRST = 1e9
"""The cost of what others wait for: it goes before them, however long they take."""


@dataclass(frozen=True)
class Asked:
    """What a step is about: which work of which recipe, for which variants or (engine, variant)."""

    step: Step
    recipe: str
    work: Work
    names: tuple[str, ...] = ()
    jobs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What of a recipe is asked for."""

    names: set[str] | None = None
    """Variants to make; None: all."""
    backends: list[str] | None = None
    variants: list[str] | None = None
    """Variants to measure, as the command line has them."""
    measure: bool = True
    only: frozenset[tuple[str, str]] | None = None
    """These (engine, variant) and no others."""


def steps_of(
    recipe: Recipe, wanted: Wanted, places: Collection[Place], seconds_of: Callable[[str, str, str], float]
) -> list[Asked]:
    """The steps of a recipe on these machines: each job once on one machine of each kind.

    `seconds_of(kind, engine, variant)`: about how long a job takes there.
    """
    name = recipe.name
    tokens = _step(f"{name}: base and tokens", cost=FIRST)
    shared = _step(f"{name}: calibration", {tokens.name}, cost=FIRST)
    shared = replace(shared, gpus=pass_devices(recipe) or 1)
    found = [Asked(tokens, name, "tokens"), Asked(shared, name, "pass", tuple(sorted(wanted.names or ())))]
    made = dict[str, str]()
    for variant in _made_by_themselves(recipe, wanted.names):
        step = _step(f"{name}: make {variant}", {shared.name}, cost=FIRST / 2)
        made[variant] = step.name
        found.append(Asked(step, name, "make", (variant,)))
    if not wanted.measure:
        return found
    jobs = list(
        dict.fromkeys((choice.name, each) for choice, each in pairs_of(recipe, wanted.backends, wanted.variants))
    )
    jobs = [job for job in jobs if wanted.only is None or job in wanted.only]
    before = set[str]()
    if recipe.evaluations:
        refer = _step(f"{name}: the base's distributions", {tokens.name}, cost=FIRST / 2)
        before = {refer.name}
        found.append(Asked(refer, name, "refer"))
    for kind in dict.fromkeys(place.kind for place in places):
        there = [place for place in places if place.kind == kind]
        # A machine that drifts must not make the later variants look slower; the same order each time.
        order = list(jobs)
        random.Random(f"{recipe.name} {recipe.workload.seed} {kind}").shuffle(order)
        size = 1 if any(place.gpus for place in there) else min(BLOCK, math.ceil(len(order) / (2 * len(there))))
        for block in (order[start : start + size] for start in range(0, len(order), max(size, 1))):
            after = before | {made.get(variant, shared.name) for _, variant in block}
            cost = sum(seconds_of(kind, *job) for job in block)
            text = f"{name}: " + ", ".join(f"{variant} on {engine}" for engine, variant in block)
            gpus = max(_gpus(recipe, engine) for engine, _ in block)
            step = replace(_step(text + f" @ {kind}", after, cost), kind=kind, gpus=gpus)
            found.append(Asked(step, name, "measure", jobs=tuple(block)))
    if recipe.endpoints and not wanted.backends:
        served = tuple((ENDPOINT, each.variant or called) for called, each in recipe.endpoints.items())
        served = tuple(job for job in served if wanted.only is None or job in wanted.only)
        step = _step(f"{name}: endpoints", before | {shared.name, *made.values()}, 1.0)
        found += [Asked(step, name, "measure", jobs=served)] if served else []
    return found


def _step(name: str, after: Collection[str] = (), cost: float = 1.0) -> Step:
    return Step(name, frozenset(after), cost=cost)


def _made_by_themselves(recipe: Recipe, names: set[str] | None) -> list[str]:
    """The variants that are not done once the calibration pass is."""
    chosen = [v for v in recipe.variants if v.method != BASE and (names is None or v.name in names)]
    wanted = {variant.name: (variant, making_of(variant)) for variant in chosen}
    carried = {name for name, _ in to_carry(recipe, wanted, names)}
    return [name for name, (_, making) in wanted.items() if making.stage != "pass" or name in carried]


def _gpus(recipe: Recipe, engine: str) -> int:
    """The most GPUs that an engine's options ask for."""
    if engine == ENDPOINT:
        return 1
    return max(devices_of(choice.options) for choice in recipe.choices(engine))
