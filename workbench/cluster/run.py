"""Recipes over many machines, from the command line to the rows: choose machines, cut into steps, see them through."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from workbench import shared
from workbench.cluster.node import Answer, Request, made_of
from workbench.cluster.schedule import Place, Schedule, Step
from workbench.cluster.steps import Asked, Wanted, steps_of
from workbench.cluster.view import View, summary
from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.home import installation, portable
from workbench.pipeline import take_up
from workbench.profile.jobs import now
from workbench.profile.rounds import ROUNDS
from workbench.quantize.make import Made
from workbench.recipe.load import Recipe
from workbench.records import Row, from_json, to_json
from workbench.report import store

RESULTS = "results"
"""The folder that rows are stored in where no other is named."""
WAIT_S = 1.0
LOOK_EVERY_S = 5.0
"""How often is looked for machines that came or went."""
REST_S = 60.0
"""For how long a machine that lost a step gets no other, if there are others: a cluster takes so long to notice that a
machine is gone, and meanwhile every step that went there would be lost."""
MOST_NAMED = 8


class Machines(Protocol):
    """Who carries steps to machines: `on_ray.RayMachines`, or in tests a clock."""

    def places(self) -> list[Place]:
        """The machines that are there."""

    def begin(self, step: Step, place: Place, request: str) -> None:
        """Send a step to one of them."""

    def wait(self, most_s: float) -> list[tuple[str, str | None, str]]:
        """(step, answer or None, why there is none) of those that ended."""

    def stop(self, name: str) -> None:
        """End a step that takes too long."""

    def close(self) -> None:
        """Leave."""


@dataclass
class Outcome:
    """What came of a recipe."""

    recipe: Recipe
    made: Made | None = None
    rows: list[tuple[str, str]] = field(default_factory=list)
    """(machine, key)."""
    failures: dict[str, str] = field(default_factory=dict)
    """Steps that came to nothing, and why."""
    results: str = ""
    """Where its rows are."""
    mend: bool = False
    """Whether the user can mend what kept the base from being made."""

    @property
    def made_at_all(self) -> Made:
        """What was made. Raises `UserError` or `WorkFailed` if not even the base was."""
        if self.made is None:
            raise (UserError if self.mend else WorkFailed)(next(iter(self.failures.values()), "nothing was made"))
        return self.made


def on(address: str) -> Machines:
    """The machines of an `--on`. Raises `UserError` for one that is not reached, or of no known kind."""
    if address.partition("://")[0] != "ray":
        raise UserError(f"--on {address}: ray, or ray://HOST:PORT")
    from workbench.cluster.on_ray import RayMachines

    return RayMachines(address)


def chosen(places: Sequence[Place], wanted: Sequence[str]) -> list[Place]:
    """The machines that are named: each word is a kind, or the value of a label or `label=value` (as Ray's
    `ray.io/accelerator-type`), in any case. Without words all of the kind of which there are most.

    Raises `UserError` for a word that names none.
    """
    if not places:
        raise UserError("no machine of the cluster answers: look at `ray status`")
    if not wanted:
        most = Counter(place.kind for place in places).most_common(1)[0][0]
        return [place for place in places if place.kind == most]
    found: dict[str, Place] = {}
    for word in wanted:
        meant = [place for place in places if _is_meant(place, {place.kind}, [word])]
        if not meant:
            known = sorted(set.union(*(_words(place) for place in places)))
            raise UserError(
                f"--machines {word}: no machine of that kind or label. There are: {', '.join(known[:MOST_NAMED])}"
            )
        found |= {place.id: place for place in meant}
    return list(found.values())


def one(
    recipe: Recipe,
    wanted: Wanted,
    address: str,
    results: str | None,
    machines: Sequence[str],
    show: Show,
    *,
    again: bool = False,
    yes_remote: bool = False,
) -> Outcome:
    """One recipe on the cluster at an address (`--on`); rows go into the store unless `results` names another place."""
    there = on(address)
    try:
        return run(
            [recipe],
            wanted,
            there,
            rows_place(results),
            show,
            only_on=machines,
            since=now() if again else "",
            yes_remote=yes_remote,
        )[0]
    finally:
        there.close()


def rows_place(results: str | None) -> str:
    """Where machines put rows that are to go to `results`; None: into the store, if there is one."""
    if results is None and shared.store():
        return f"{shared.store()}/{RESULTS}"
    place = results or RESULTS
    return place if "://" in place else str(Path(place).absolute())


def run(
    recipes: Sequence[Recipe],
    wanted: Wanted,
    machines: Machines,
    results: str,
    show: Show,
    *,
    only_on: Sequence[str] = (),
    since: str = "",
    yes_remote: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Make and measure recipes on the machines; an outcome for each recipe, in order.

    Whatever a machine finished is in the store and among the rows at once: run again after any end, it goes on.
    `only_on`: kinds or labels of machines; else those that each recipe names. Raises `UserError` where there is no
    store and more than one machine, no machine that was asked for, or two recipes of one name.
    """
    if twice := [name for name, count in Counter(recipe.name for recipe in recipes).items() if count > 1]:
        raise UserError(f"two recipes are called {twice[0]}: give each a `name` of its own")
    there = machines.places()
    chosen_for = {recipe.name: chosen(there, only_on or recipe.machines) for recipe in recipes}
    places = [place for place in there if any(place in those for those in chosen_for.values())]
    # Of machines that come later; a recipe that names none takes any of its kind.
    named = [only_on or recipe.machines for recipe in recipes]
    words = [word for those in named for word in those] if all(named) else []
    where = shared.store()
    if where is None and len(places) > 1:
        raise UserError("several machines: name the store they share: --store s3://bucket/prefix, or a shared folder")
    installation()  # Of the store, before two machines name it at once.
    kinds = {place.kind for place in places}
    known = _durations(results)
    outcomes = {recipe.name: Outcome(recipe, results=results) for recipe in recipes}
    for recipe in recipes:
        take_up(recipe, show)
    texts = {recipe.name: recipe.path.read_text(encoding="utf-8") for recipe in recipes}
    asked: dict[str, Asked] = {}
    for recipe in recipes:

        def seconds_of(kind: str, engine: str, variant: str, recipe: str = recipe.name) -> float:
            return known.get((kind, recipe, engine, variant), 60.0)

        asked |= {each.step.name: each for each in steps_of(recipe, wanted, chosen_for[recipe.name], seconds_of)}
    driver = Driver([each.step for each in asked.values()], machines, show, clock)

    def request_of(name: str) -> str:
        each = asked[name]
        outcome = outcomes[each.recipe]
        recipe = outcome.recipe
        names = {variant for _, variant in each.jobs} if each.jobs else None
        request = Request(
            work=each.work,
            recipe=str(recipe.path.absolute()),
            text=texts[recipe.name],
            store=where or "",
            results=results if wanted.measure else "",
            names=list(each.names) or None,
            backends=wanted.backends,
            variants=wanted.variants,
            jobs=[*each.jobs],
            since=since,
            yes_remote=yes_remote,
            made=_about(outcome.made, names) if each.work in ("refer", "measure") else None,
        )
        return json.dumps(to_json(request))

    def answered(name: str, text: str, place: Place) -> None:
        answer: Answer = from_json(Answer, json.loads(text))
        outcome = outcomes[asked[name].recipe]
        for line in dict.fromkeys(answer.said):
            show.say(f"{place.name}: {line}")
        if answer.error:
            outcome.mend = outcome.made is None and answer.mend
            driver.view.failed += 1
            lost(name, answer.error)
        if answer.made is not None:
            outcome.made = _with(outcome.made, made_of(answer.made))
        outcome.rows += answer.rows

    def lost(name: str, why: str) -> None:
        each, outcome = asked[name], outcomes[asked[name].recipe]
        if each.work == "tokens":
            # Nothing can be made of a base that is not there.
            driver.schedule.drop([other for other in asked if asked[other].recipe == each.recipe])
        if each.work in ("pass", "make") and outcome.made is not None:
            names = each.names or tuple(v.name for v in outcome.recipe.variants if v.method != "base")
            missing = [variant for variant in names if variant not in outcome.made.artifacts]
            outcome.made = replace(outcome.made, failures=outcome.made.failures | dict.fromkeys(missing, why))
        outcome.failures[name] = why
        if outcome.made is not None or len(outcomes) > 1:
            show.say(f"{name} failed: {why}")

    with show.task(f"{', '.join(outcomes)} on {len(places)} machines") as progress:
        driver.run(
            lambda: [place for place in machines.places() if _is_meant(place, kinds, words)],
            request_of,
            answered,
            lost,
            progress,
            lambda name: limit_of(outcomes[asked[name].recipe].recipe, asked[name]),
        )
    made = sum(len(each.made.artifacts) - 1 for each in outcomes.values() if each.made)
    rows = sum(len(each.rows) for each in outcomes.values())
    show.say(summary(driver.schedule, made, rows, Counter(place.kind for place in places)))
    return list(outcomes.values())


class Driver:
    """Sees steps through: begins what can be begun, tries again what was lost, ends what takes too long."""

    def __init__(
        self, steps: Sequence[Step], machines: Machines, show: Show, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.schedule = Schedule(steps)
        self.view = View(self.schedule, show, clock)
        self._machines, self._show, self._clock = machines, show, clock

    def run(
        self,
        places: Callable[[], list[Place]],
        request_of: Callable[[str], str],
        answered: Callable[[str, str, Place], None],
        lost: Callable[[str, str], None],
        progress: Callable[[float, float, str], None] = lambda done, total, detail: None,
        limit_s: Callable[[str], float] = lambda name: float("inf"),
    ) -> None:
        """Until every step has come to its end or was given up."""
        schedule, looked = self.schedule, float("-inf")
        begun: dict[str, tuple[float, Place]] = {}
        lost_at: dict[str, float] = {}
        while schedule.left:
            if self._clock() - looked >= LOOK_EVERY_S:
                looked, there = self._clock(), places()
                fit = [place for place in there if looked - lost_at.get(place.id, float("-inf")) >= REST_S] or there
                for gone in {place.id for place in schedule.places} - {place.id for place in fit}:
                    schedule.leave(gone)
                schedule.join(fit)
            for step, place in schedule.begin():
                begun[step.name] = self._clock(), place
                self._machines.begin(step, place, request_of(step.name))
            for name in schedule.stranded():
                lost(name, schedule.given_up[name])
            for name, answer, why in self._machines.wait(WAIT_S):
                _, place = begun.pop(name)
                if answer is not None:
                    schedule.ended(name)
                    answered(name, answer, place)
                    continue
                looked, lost_at[place.id] = float("-inf"), self._clock()
                if schedule.failed(name, why):
                    self._show.say(f"{name}: {why}; it is begun again")
                else:
                    lost(name, schedule.given_up[name])
            for name, (since, _) in begun.items():
                if self._clock() - since > limit_s(name):
                    self._machines.stop(name)
            self.view.tell()
            if self._show.live:  # A log has the view's lines.
                progress(len(schedule.steps) - schedule.left, len(schedule.steps), "")


def _is_meant(place: Place, kinds: Collection[str], words: Sequence[str]) -> bool:
    """Whether a machine, which may have come later, is one of those that were chosen."""
    return place.kind in kinds and (not words or not _words(place).isdisjoint(word.lower() for word in words))


def _words(place: Place) -> set[str]:
    labels = {value for value in place.labels.values()} | {f"{key}={value}" for key, value in place.labels.items()}
    return {word.lower() for word in {place.kind, *labels}}


def _durations(results: str) -> dict[tuple[str, str, str, str], float]:
    """(machine, recipe, engine, variant) -> how long it took the last time."""
    rows, _ = store.read(results)
    return {
        (store.machine_of(row), row.recipe, row.backend, row.artifact.variant): row.duration_s
        for row in rows
        if row.measurement
    }


def _with(made: Made | None, more: Made) -> Made:
    """What was made, and what another step made."""
    if made is None:
        return more
    artifacts = dict(made.artifacts)
    for name, forms in more.artifacts.items():
        had = artifacts.get(name, [])
        artifacts[name] = had + [each for each in forms if each.digest not in {one.digest for one in had}]
    return replace(
        made,
        artifacts=artifacts,
        failures=made.failures | more.failures,
        refused=made.refused | more.refused,
    )


def _about(made: Made | None, names: set[str] | None) -> dict[str, object] | None:
    """What a job needs to know of what was made: that of its variants and the base."""
    if made is None:
        return None
    kept = {"base", *(names or ())}
    artifacts = {name: forms for name, forms in made.artifacts.items() if name in kept}
    told: dict[str, object] = portable(to_json(replace(made, artifacts=artifacts)))
    return told


def rows_of(outcome: Outcome) -> list[Row]:
    """The rows of an outcome as they are stored, machine by machine, each in the order of its recipe."""
    wanted = set(outcome.rows)
    rows, _ = store.read(outcome.results)
    found = [row for row in rows if (store.machine_of(row), row.key) in wanted]
    return sorted(found, key=lambda row: (store.machine_of(row), row.place))


def limit_of(recipe: Recipe, each: Asked) -> float:
    """After how many seconds a step is taken for one that hangs. A machine ends its own workers sooner: this is for
    what it cannot end itself."""
    rounds = ROUNDS + 1
    measuring = recipe.limits.profile_s * rounds * max(len(each.jobs), 1)
    return 2 * (measuring if each.work in ("refer", "measure") else recipe.limits.quantize_s)
