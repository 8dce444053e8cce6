"""A recipe's texts and tasks, looked at before anything is made."""

from __future__ import annotations

from pathlib import Path

from workbench.machine.work import ask
from workbench.recipe.load import Recipe
from workbench.records import TextsRequest, to_json


def check_texts(recipe: Recipe) -> list[str]:
    """Have a worker read them. Returns notes of what it did not; raises `UserError` for what a run would refuse."""
    folder = recipe.path.parent
    bare = recipe.base.config is not None and recipe.base.tokenizer is None  # Then a run cuts no windows.
    sets = [] if bare else recipe.token_sets()
    tasks = {name: task.resolved(folder) for name, task in recipe.tasks.items()}
    if not sets and not tasks:
        return []
    file = Path(recipe.base.source(folder).get("path", "")) / "tokenizer.json"
    request = TextsRequest(sets, tasks, str(file) if recipe.base.path and file.is_file() else None)
    unread = ask("workbench.worker.tokens.check:check", to_json(request), limit_s=600)
    assert isinstance(unread, list)
    return [f"{source} was not looked at" for source in unread]
