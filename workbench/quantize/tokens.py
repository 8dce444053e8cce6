"""A recipe's token ids: evaluation sets, calibration and tasks, made once and the same for every engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.errors import UserError
from workbench.home import entry
from workbench.machine.work import work
from workbench.recipe.load import Recipe
from workbench.records import (
    TEXT_VERSION,
    CalibrationTokens,
    Evaluation,
    PreparedBase,
    Task,
    Tasks,
    TasksRequest,
    TokenSets,
    TokensRequest,
    digest,
    to_json,
)

TASKS_VERSION = 1
"""Version of the way a task's file becomes token ids."""


def tokenize(recipe: Recipe, base: PreparedBase, show: Show) -> tuple[dict[str, Evaluation], CalibrationTokens | None]:
    """A recipe's evaluation sets by name, and its calibration, as far as it has them."""
    look, remote_code, sets = recipe.calibration, recipe.base.trust_remote_code, recipe.token_sets()
    # Files are named by place: two recipes may name the same tokens differently.
    places = ["evaluation" if i == 0 else f"evaluation-{i + 1}" for i in range(len(recipe.evaluations))]
    if look:
        places.append("calibration")
    if not sets or not base.tokenizer:
        return {}, None
    overlap = bool(look and look.allow_overlap)
    # As the key was when sets could begin further in and said not where they go: else all tokens would be made anew.
    causes = [{k: v for k, v in to_json(each).items() if k != "out"} | {"skip_windows": 0} for each in sets]
    key = digest([base.digest, causes, overlap, [_stamp(each.source) for each in sets]])

    def build(partial: Path) -> TokenSets:
        asked = [replace(each, out=str(partial / f"{where}.json")) for each, where in zip(sets, places, strict=True)]
        made, cost = work(
            "workbench.worker.tokens.windows:build",
            TokensRequest(base.path, asked, overlap, remote_code),
            dict[str, list[Evaluation]],
            show,
            "tokens",
            limit_s=recipe.limits.quantize_s,
        )
        return TokenSets(dict(zip(places, made["sets"], strict=True)), TEXT_VERSION, cost)

    place, record = entry("tokens", key, TokenSets, build)
    found = {where: replace(made, path=str(place / f"{where}.json")) for where, made in record.sets.items()}
    evaluations = {
        name: replace(found[where], name=name) for where, name in zip(places, recipe.evaluations, strict=False)
    }
    calibration = found.get("calibration")
    return evaluations, CalibrationTokens(calibration.path, calibration.digest) if calibration else None


def tasks(recipe: Recipe, base: PreparedBase, show: Show) -> dict[str, Task]:
    """The recipe's tasks by name, tokenized."""
    if not recipe.tasks:
        return {}
    if not base.tokenizer:
        raise UserError(
            f"{recipe.path}: tasks: the base has no tokenizer to spell them with. Give it one, or remove them"
        )
    given = {name: task.resolved(recipe.path.parent) for name, task in recipe.tasks.items()}
    remote_code = recipe.base.trust_remote_code
    key = digest([base.digest, given, [_stamp(task) for task in given.values()], TASKS_VERSION, remote_code])

    def build(partial: Path) -> Tasks:
        made, cost = work(
            "workbench.worker.tokens.tasks:build",
            TasksRequest(base.path, given, str(partial), remote_code),
            Tasks,
            show,
            "tasks",
            limit_s=recipe.limits.quantize_s,
        )
        return replace(made, cost=cost)

    place, record = entry("tasks", key, Tasks, build)
    return {name: replace(task, path=str(place / task.path)) for name, task in record.tasks.items()}


def _stamp(source: dict[str, str]) -> list[int]:
    """Size and time of a local file, so that an edited text is tokenized again."""
    if "file" not in source or "package" in source:
        return []
    try:
        status = Path(source["file"]).stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
