"""From a recipe to artifacts: every step a child process, every result kept under the digest of its causes.

    base (downloaded, de-quantized, rewritten) -> token ids -> one GGUF conversion -> every variant
                                                           -> the base's distributions, before a job is measured

What is already there is not made again; what fails is told and the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.machine.identity import has_cuda
from workbench.plan.make import cannot_be_made, check_context
from workbench.quantize.alone import make_alone
from workbench.quantize.base import as_gguf, as_loaded, base_artifact, prepare
from workbench.quantize.calibrated import run_calibration
from workbench.quantize.priced import run_prices
from workbench.quantize.tokens import tasks, tokenize
from workbench.recipe.choices import form_for, limits_of, making_of, wants_gguf_base
from workbench.recipe.load import Recipe
from workbench.records import Artifact, CarriedVariant, Evaluation, PreparedBase, Task, Variant
from workbench.worker.methods import BASE, Making, method_named

Until = Literal["tokens", "pass", ""]
"""After what to stop: base and tokens; what looks at all of the base at once, and what that makes; nothing."""


@dataclass(frozen=True)
class Made:
    """Everything a recipe's jobs need: the base, the tokens, artifacts by variant, and what failed."""

    base: PreparedBase
    artifacts: dict[str, list[Artifact]]
    failures: dict[str, str]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name, in the recipe's order."""
    tasks: dict[str, Task] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Why a variant that was made has no form for an engine that reads no other."""


def make(recipe: Recipe, show: Show, names: set[str] | None = None, until: Until = "") -> Made:
    """Base, tokens and the named variants (default: all) of a recipe, made or found in the cache; or only what comes
    first of it."""
    base = prepare(recipe, show)
    for note in check_context(recipe, base.context_length):
        show.say(f"note: {note}")
    evaluations, calibration = tokenize(recipe, base, show)
    asked = tasks(recipe, base, show)
    starts = {v.source for v in recipe.variants if isinstance(v, CarriedVariant) and names and v.name in names}
    chosen = [v for v in recipe.variants if v.method != BASE and (names is None or v.name in names | starts)]
    wanted = {variant.name: (variant, making_of(variant, has_cuda())) for variant in chosen}
    artifacts: dict[str, list[Artifact]] = {BASE: [base_artifact(base)]}
    if until == "tokens":
        return Made(base, artifacts, {}, evaluations, asked)
    failures = cannot_be_made(recipe, [v for v, making in wanted.values() if making.calibration == "prices"])
    for name, reason in failures.items():
        show.say(f"{name} failed: {reason}")
    source: Artifact | None = None
    if wants_gguf_base(chosen, recipe.backends):
        try:
            source, for_engines = as_gguf(recipe, base, show)
            artifacts[BASE].append(for_engines)
        except (WorkFailed, UserError) as problem:
            lost = [BASE, *(name for name, (_, making) in wanted.items() if making.stage == "gguf")]
            failures |= dict.fromkeys(lost, f"the base has no GGUF form: {problem}")
            show.say(f"converting the base to GGUF failed: {problem}")
    possible = {name: each for name, each in wanted.items() if name not in failures}
    imatrix, calibrated = run_calibration(recipe, base, calibration, possible, show, failures)
    prices = run_prices(recipe, base, calibration, imatrix, possible, show, failures)
    for name, (variant, making) in wanted.items():
        if name in failures or isinstance(variant, CarriedVariant) or (until == "pass" and making.stage != "pass"):
            continue
        show.whole = f"{len(artifacts) - 1} of {len(wanted)} variants made"
        looks_at = {"": None, "tokens": calibration, "imatrix": imatrix, "prices": prices}[making.calibration]
        form = method_named(variant.method).WRITES[0]
        try:
            if making.stage == "pass":
                if name not in calibrated:
                    raise WorkFailed(f"method {variant.method}: the calibration pass made nothing of it")
                artifacts[name] = [calibrated[name]]
            elif making.stage == "load":
                artifacts[name] = [as_loaded(recipe, base, variant, making, form)]
            else:
                start = source if making.stage == "gguf" else None
                grams = imatrix.grams if imatrix and making.grams else None
                artifacts[name] = [
                    make_alone(
                        recipe, base, variant, making, show, form=form, source=start, looks_at=looks_at, grams=grams
                    )
                ]
        except (WorkFailed, UserError) as problem:
            failures[name] = str(problem)
            show.say(f"{name} failed: {problem}")
    show.whole, refused = "", dict[str, str]()
    if until == "pass":
        return Made(base, artifacts, failures, evaluations, asked)
    for (name, form), start_name in to_carry(recipe, wanted, names).items():
        carried = name != start_name
        if start_name not in artifacts:
            failures |= {name: f"{start_name}, which it is carried from, was not made"} if carried else {}
            continue
        making = wanted[start_name][1]
        how = making.carried[form]
        how = replace(how, source=making, file_name=start_name + how.file_name)
        start, variant = artifacts[start_name][0], wanted[name][0]
        try:
            made = make_alone(recipe, base, variant, how, show, form=form, source=start)
            artifacts[name] = [*artifacts.get(name, []), made]
        except (WorkFailed, UserError) as problem:
            told = refused if isinstance(problem, UserError) and not carried else failures
            told[name] = str(problem)
            if told is failures:
                show.say(f"{name} as {form} failed: {problem}")
    return Made(base, artifacts, failures, evaluations, asked, refused)


def to_carry(
    recipe: Recipe, wanted: Mapping[str, tuple[Variant, Making]], names: set[str] | None
) -> dict[tuple[str, str], str]:
    """(variant, format) -> the variant whose artifact is carried: variants that are another's, and further forms of a
    variant for the engines that the recipe sends it to (all engines, if it is one of `names`)."""
    found: dict[tuple[str, str], str] = {}
    for name, (variant, making) in wanted.items():
        if isinstance(variant, CarriedVariant):
            found[name, variant.form] = variant.source
            continue
        for choice in recipe.backends:
            form = form_for(variant, choice.name)
            sent = choice.takes(name) if names is None else name in names
            if sent and choice.name not in limits_of(variant) and form in making.carried:
                found[name, form] = name
    return found
