"""What a machine does of a step that came to it: the same functions as without a cluster, on this machine's own cache,
which takes from the store what others made."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench import __version__, pipeline, shared
from workbench.cache import at_work
from workbench.cluster.schedule import Place
from workbench.console import Growing
from workbench.errors import UserError, WorkFailed
from workbench.gpus import gpus
from workbench.home import OWN_GPUS, bring, local, portable
from workbench.machine.identity import machine
from workbench.profile.reference import all_references, reference_keys
from workbench.quantize.base import prepare
from workbench.quantize.make import Made, make
from workbench.recipe.load import Recipe, load
from workbench.records import digest, from_json, to_json
from workbench.report import store
from workbench.scratch import temporary


@dataclass(frozen=True)
class Request:
    """A step, as it is sent to a machine."""

    work: str
    """As in `steps.Work`."""
    recipe: str
    """Where it was read from, and what it said."""
    text: str
    store: str
    results: str
    """Where rows go; empty where nothing is to be measured."""
    names: list[str] | None = None
    backends: list[str] | None = None
    variants: list[str] | None = None
    jobs: list[tuple[str, str]] = field(default_factory=list)
    since: str = ""
    yes_remote: bool = False
    made: dict[str, Any] | None = None
    """What was made before, as `portable` JSON."""


@dataclass(frozen=True)
class Answer:
    """What came of a step."""

    machine: str
    made: dict[str, Any] | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)
    """(machine, key) of each that is stored now."""
    said: list[str] = field(default_factory=list)
    error: str = ""
    """Why it came to nothing; to try again would not help."""
    mend: bool = False
    """Whether the user can."""


class Told:
    """A `Show` that keeps what is said, for whoever asked for the step."""

    whole, live = "", False
    table: Growing | None = None

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """One line."""
        self.lines.append(text)

    @contextlib.contextmanager
    def task(self, text: str, told: bool = True) -> Iterator[Callable[[float, float, str], None]]:
        """How far a step is, which nobody here looks at."""
        yield lambda done, total, detail: None

    def put_away(self, keep: bool) -> None:
        """Nothing was drawn."""


def look() -> str:
    """What this machine is, as JSON; asked once, before it is given anything."""
    here = machine()
    return json.dumps({"name": here.name, "gpus": len(here.gpus), "version": __version__})


def place_of(id: str, name: str, labels: dict[str, str], told: str) -> Place:
    """The machine that said so of itself. Raises `UserError` for another version of this program."""
    said = json.loads(told)
    if said["version"] != __version__:
        raise UserError(
            f"{name}: workbench {said['version']} there, {__version__} here, and they would not make the same. "
            "Install one version on all machines"
        )
    return Place(id, said["name"], said["gpus"], name=name, labels=labels)


def run(text: str) -> str:
    """Do a step; its `Request` and `Answer` as JSON.

    What is this machine's own fault (it is killed, it goes away) leaves no answer, and another machine tries.
    """
    request: Request = from_json(Request, json.loads(text))
    os.environ[shared.STORE] = request.store
    sys.argv = ["workbench", request.work, request.recipe]  # Who it is, for whoever waits for it.
    if owned := gpus():
        # Other steps have the others; those that share none may work side by side.
        os.environ[OWN_GPUS] = ",".join(gpu.uuid for gpu in owned)
    show = Told()
    try:
        with at_work(show.say), _recipe(request) as recipe:
            made, rows = _done(request, recipe, show)
    except (UserError, WorkFailed) as problem:
        mend = isinstance(problem, UserError)
        return json.dumps(to_json(Answer(machine().name, said=show.lines, error=str(problem), mend=mend)))
    told = portable(to_json(made)) if made else None
    return json.dumps(to_json(Answer(machine().name, told, rows, show.lines)))


def _done(request: Request, recipe: Recipe, show: Told) -> tuple[Made | None, list[tuple[str, str]]]:
    names = None if request.names is None else set(request.names)
    if request.results:
        store.try_writing(request.results, machine().name)
    if request.work == "tokens":
        return make(recipe, show, set(), until="tokens"), []
    if request.work == "pass":
        return make(recipe, show, names, until="pass"), []
    if request.work == "make":
        return make(recipe, show, names), []
    made = _here(recipe, made_of(request.made), show)
    if request.work == "refer":
        all_references(recipe, made, reference_keys(recipe, made), show)
        return None, []
    measured = pipeline.profile(
        recipe,
        made,
        show,
        request.results,
        backends=request.backends,
        variants=request.variants,
        since=request.since,
        only={(engine, variant) for engine, variant in request.jobs},
        yes_remote=request.yes_remote,
    )
    return None, [(store.machine_of(row), row.key) for row in measured]


def made_of(told: Any) -> Made:
    """What a machine said that it made, with paths as they are on this one."""

    def here(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: here(item) for key, item in value.items()}
        if isinstance(value, list):
            return [here(item) for item in value]
        return str(local(value)) if isinstance(value, str) and value.startswith(("$WORKBENCH_HOME", "~/")) else value

    made: Made = from_json(Made, here(told))
    return made


def _here(recipe: Recipe, made: Made, show: Told) -> Made:
    """What was made elsewhere, its files on this machine."""
    base = prepare(recipe, show)
    artifacts = {
        name: [replace(each, path=base.path) if each.path == made.base.path else each for each in forms]
        for name, forms in made.artifacts.items()
    }
    files = [each.path for forms in artifacts.values() for each in forms]
    files += [each.path for each in made.evaluations.values()] + [each.path for each in made.tasks.values()]
    for file in files:
        bring(file)
    return replace(made, base=base, artifacts=artifacts)


@contextlib.contextmanager
def _recipe(request: Request) -> Iterator[Recipe]:
    """The recipe as it was sent; read from its place if that is here, so that files beside it are found."""
    file = Path(request.recipe)
    with contextlib.suppress(OSError):
        if file.read_text(encoding="utf-8") == request.text:
            yield load(file)
            return
    with temporary() as folder:
        copy = Path(folder, digest(request.text)[:8] + file.suffix)
        copy.write_text(request.text, encoding="utf-8")
        yield load(copy)
