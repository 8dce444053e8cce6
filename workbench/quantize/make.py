"""From a recipe to artifacts: every step a child process, every result kept under the digest of its causes.

    base (downloaded, de-quantized, rewritten) -> token ids -> one GGUF conversion -> every variant
                                                           -> the base's distributions, before a job is measured

What is already there is not made again; what fails is told and the others go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.machine.identity import has_cuda
from workbench.plan.make import check_context
from workbench.quantize.alone import make_alone
from workbench.quantize.base import as_gguf, as_loaded, base_artifact, prepare
from workbench.quantize.calibrated import run_calibration
from workbench.quantize.tokens import tasks, tokenize
from workbench.recipe.choices import form_for, limits_of, making_of, wants_gguf_base
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Evaluation, PreparedBase, Task, Variant
from workbench.worker.methods import BASE, Making, method_named


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


def make(recipe: Recipe, show: Show, names: set[str] | None = None) -> Made:
    """Base, tokens and the named variants (default: all) of a recipe, made or found in the cache."""
    base = prepare(recipe, show)
    check_context(recipe, base.context_length)
    evaluations, calibration = tokenize(recipe, base, show)
    asked = tasks(recipe, base, show)
    chosen = [v for v in recipe.variants if v.method != BASE and (names is None or v.name in names)]
    wanted = {variant.name: (variant, making_of(variant, has_cuda())) for variant in chosen}
    artifacts: dict[str, list[Artifact]] = {BASE: [base_artifact(base)]}
    failures: dict[str, str] = {}
    source: Artifact | None = None
    if wants_gguf_base(chosen, recipe.backends):
        try:
            source, for_engines = as_gguf(recipe, base, show)
            artifacts[BASE].append(for_engines)
        except (WorkFailed, UserError) as problem:
            lost = [BASE, *(name for name, (_, making) in wanted.items() if making.stage == "gguf")]
            failures |= dict.fromkeys(lost, f"the base has no GGUF form: {problem}")
            show.say(f"converting the base to GGUF failed: {problem}")
    imatrix, calibrated = run_calibration(recipe, base, calibration, wanted, show, failures)
    for name, (variant, making) in wanted.items():
        if name in failures:
            continue
        looks_at = {"": None, "tokens": calibration, "imatrix": imatrix}[making.calibration]
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
                artifacts[name] = [
                    make_alone(recipe, base, variant, making, show, form=form, source=start, looks_at=looks_at)
                ]
        except (WorkFailed, UserError) as problem:
            failures[name] = str(problem)
            show.say(f"{name} failed: {problem}")
    refused: dict[str, str] = {}
    for name, form in _carried(recipe, artifacts, wanted, named=names is not None):
        variant, making = wanted[name]
        how = replace(making.carried[form], source=making, file_name=f"{name}.{form}")
        try:
            carried = make_alone(recipe, base, variant, how, show, form=form, source=artifacts[name][0])
            artifacts[name].append(carried)
        except UserError as problem:
            refused[name] = str(problem)
        except WorkFailed as problem:
            failures[name] = str(problem)
            show.say(f"{name} as {form} failed: {problem}")
    return Made(base, artifacts, failures, evaluations, asked, refused)


def _carried(
    recipe: Recipe,
    artifacts: Mapping[str, list[Artifact]],
    wanted: Mapping[str, tuple[Variant, Making]],
    named: bool,
) -> list[tuple[str, str]]:
    """Variants that were made, and further forms of them for the engines that the recipe sends them to (all engines, if
    they are `named`)."""
    found: dict[tuple[str, str], None] = {}
    for name, (variant, making) in wanted.items():
        for choice in recipe.backends:
            form = form_for(variant, choice.name)
            sent = (named or choice.takes(name)) and choice.name not in limits_of(variant)
            if sent and form in making.carried and artifacts.get(name):
                found[name, form] = None
    return list(found)
