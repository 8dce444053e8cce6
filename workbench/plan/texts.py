"""A recipe's texts and tasks, looked at before anything is made."""

from __future__ import annotations

from pathlib import Path

from workbench.machine.work import ask
from workbench.recipe.load import Recipe
from workbench.records import TextsRequest, TokenSet, to_json


def check_texts(recipe: Recipe) -> list[str]:
    """Have a worker read them. Returns notes of what it did not; raises `UserError` for what a run would refuse."""
    folder, look = recipe.path.parent, recipe.calibration
    bare = recipe.base.config is not None and recipe.base.tokenizer is None  # Then a run cuts no windows.
    sets = [
        TokenSet("evaluation", name, test.source.resolved(folder), test.window, test.windows, test.score, test.stride)
        for name, test in recipe.evaluations.items()
    ]
    if look:
        source = look.source.resolved(folder)
        sets.append(TokenSet("calibration", "calibration", source, look.window, look.windows, "all", seed=look.seed))
    tasks = {name: task.resolved(folder) for name, task in recipe.tasks.items()}
    sets = [] if bare else sets
    if not sets and not tasks:
        return []
    file = Path(recipe.base.source(folder).get("path", "")) / "tokenizer.json"
    request = TextsRequest(sets, tasks, str(file) if recipe.base.path and file.is_file() else None)
    unread = ask("workbench.worker.tokens.check:check", to_json(request), limit_s=600)
    assert isinstance(unread, list)
    return [f"{source} was not looked at" for source in unread]
