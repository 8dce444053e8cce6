"""A recipe's token ids: evaluation sets, calibration and tasks, made once and the same for every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.console import Show
from workbench.errors import UserError
from workbench.home import entry
from workbench.machine.work import work
from workbench.recipe.load import Recipe
from workbench.records import Evaluation, Task, digest, from_json

TASKS_VERSION = 1
"""Of the way a task's file becomes token ids."""


def tokenize(recipe: Recipe, base: dict[str, Any], show: Show) -> tuple[dict[str, Evaluation], dict[str, Any] | None]:
    """A recipe's evaluation sets by name, and its calibration (`path`, `digest`, ...), as far as it has them."""
    folder = recipe.path.parent
    sets: list[dict[str, Any]] = []
    for name, test in recipe.evaluations.items():
        sets.append(
            {
                "role": "evaluation",
                "name": name,
                "source": test.source.resolved(folder),
                "window": test.window,
                "windows": test.windows,
                "score": test.score,
                "stride": test.stride,
                "seed": 0,
            }
        )
    if recipe.calibration:
        look = recipe.calibration
        sets.append(
            {
                "role": "calibration",
                "name": "calibration",
                "source": look.source.resolved(folder),
                "window": look.window,
                "windows": look.windows,
                "score": "all",
                "stride": None,
                "seed": look.seed,
            }
        )
    if not sets or base.get("tokenizer") is False:
        return {}, None
    overlap = bool(recipe.calibration and recipe.calibration.allow_overlap)
    stamps = [_stamp(entry["source"]) for entry in sets]
    # A key that was there when sets could begin further in; without it all tokens would be made anew.
    key = digest([base["digest"], [{**each, "skip_windows": 0} for each in sets], overlap, stamps])
    # Files are named by place: two recipes may name the same tokens differently.
    places = ["evaluation" if i == 0 else f"evaluation-{i + 1}" for i in range(len(recipe.evaluations))]
    places += ["calibration"] if recipe.calibration else []

    def build(partial: Path) -> dict[str, Any]:
        payload = {
            "base": base["path"],
            "allow_overlap": overlap,
            "allow_remote_code": recipe.base.trust_remote_code,
            "sets": [
                {**entry, "out": str(partial / f"{where}.json")} for entry, where in zip(sets, places, strict=True)
            ],
        }
        made, cost = work(
            "workbench.worker.tokens.windows:build", payload, show, "tokens", limit_s=recipe.limits.quantize_s
        )
        return {"sets": dict(zip(places, made["sets"], strict=True)), "cost": cost}

    place, record = entry("tokens", key, build)
    found = {where: {**answer, "path": str(place / f"{where}.json")} for where, answer in record["sets"].items()}
    evaluations = {
        name: from_json(Evaluation, {**found[where], "name": name})
        for where, name in zip(places, recipe.evaluations, strict=False)
    }
    return evaluations, found.get("calibration")


def tasks(recipe: Recipe, base: dict[str, Any], show: Show) -> dict[str, Task]:
    """The recipe's tasks by name, tokenized."""
    if not recipe.tasks:
        return {}
    if base.get("tokenizer") is False:
        raise UserError(
            f"{recipe.path}: tasks: the base has no tokenizer to spell them with. Give it one, or remove them"
        )
    given = {name: task.resolved(recipe.path.parent) for name, task in recipe.tasks.items()}
    stamps = [_stamp(task) for task in given.values()]
    key = digest([base["digest"], given, stamps, TASKS_VERSION, recipe.base.trust_remote_code])

    def build(partial: Path) -> dict[str, Any]:
        payload = {
            "base": base["path"],
            "tasks": given,
            "out": str(partial),
            "allow_remote_code": recipe.base.trust_remote_code,
        }
        made, cost = work(
            "workbench.worker.tokens.tasks:build", payload, show, "tasks", limit_s=recipe.limits.quantize_s
        )
        return {**made, "cost": cost}

    place, record = entry("tasks", key, build)
    made = {name: {**task, "path": str(place / task["path"])} for name, task in record["tasks"].items()}
    return {name: from_json(Task, task) for name, task in made.items()}


def _stamp(source: dict[str, Any]) -> list[Any]:
    """Size and time of a local file, so that an edited text is tokenized again."""
    if "file" not in source or "package" in source:
        return []
    try:
        status = Path(source["file"]).stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
