"""From a recipe to artifacts: every step a child process, every result kept under the digest of its causes.

    base (downloaded, de-quantized, rewritten) -> token ids -> one GGUF conversion -> every variant
                                                           -> the base's distributions, before a job is measured

What is already there is not made again; what fails is told and the others go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.plan.make import check_context
from workbench.quantize.base import base_artifact, prepare
from workbench.quantize.calibrated import run_calibration
from workbench.quantize.gguf import convert_base, quantize_gguf, sixteen_bit
from workbench.quantize.tokens import tasks, tokenize
from workbench.recipe.load import Recipe
from workbench.records import Artifact, Evaluation, PreparedBase, Task


@dataclass(frozen=True)
class Made:
    """Everything a recipe's jobs need: the base, the tokens, artifacts by variant, and what failed."""

    base: PreparedBase
    artifacts: dict[str, list[Artifact]]
    failures: dict[str, str]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Evaluation sets by name, in the recipe's order."""
    tasks: dict[str, Task] = field(default_factory=dict)


def make(recipe: Recipe, show: Show, names: set[str] | None = None) -> Made:
    """Base, tokens and the named variants (default: all) of a recipe, made or found in the cache."""
    base = prepare(recipe, show)
    check_context(recipe.workload.longest, base.context_length, f"{recipe.path}: workload")
    evaluations, calibration = tokenize(recipe, base, show)
    asked = tasks(recipe, base, show)
    wanted = [v for v in recipe.variants if v.method != "base" and (names is None or v.name in names)]
    artifacts: dict[str, list[Artifact]] = {"base": [base_artifact(base)]}
    failures: dict[str, str] = {}
    source: Artifact | None = None
    needs_gguf = any(v.method == "gguf" for v in wanted) or any(c.name == "llamacpp" for c in recipe.backends)
    if needs_gguf:
        try:
            source = convert_base(recipe, base, show)
            artifacts["base"].append(sixteen_bit(recipe, base, source, show))
        except (WorkFailed, UserError) as problem:
            lost = ["base", *(v.name for v in wanted if v.method == "gguf")]
            failures |= dict.fromkeys(lost, f"the base has no GGUF form: {problem}")
            show.say(f"converting the base to GGUF failed: {problem}")
    imatrix, calibrated = run_calibration(recipe, base, calibration, wanted, show, failures)
    for variant in wanted:
        if variant.name in failures:
            continue
        try:
            if variant.method == "gguf" and source is not None:
                artifacts[variant.name] = [quantize_gguf(recipe, base, source, variant, imatrix, show)]
            elif variant.name in calibrated:
                artifacts[variant.name] = [calibrated[variant.name]]
        except (WorkFailed, UserError) as problem:
            failures[variant.name] = str(problem)
            show.say(f"{variant.name} failed: {problem}")
    return Made(base, artifacts, failures, evaluations, asked)
