"""One night: make and measure the recipes anew, compare with the good nights before, remember, publish, tell.

Everything that a scheduled job decides is decided here or in `report/verdicts/night.py`, so that it can be tested
without a scheduler; the workflow only calls it. A night that was killed is taken up where it was by the next call:
what it had measured stays, what it had not is measured. An issue is opened, commented on or closed only where asked
for, by GitHub's own command line with the credentials it has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import pipeline
from workbench.cache import at_work
from workbench.cluster import check_machines
from workbench.console import Show
from workbench.disk import remove, write_whole
from workbench.errors import UserError, install_with
from workbench.home import home, lock
from workbench.intact import open_file
from workbench.machine.identity import machine
from workbench.recipe.load import Recipe
from workbench.records import Row, digest
from workbench.report import store
from workbench.report.selection import pair_of
from workbench.report.site import publish
from workbench.report.verdicts import night
from workbench.report.verdicts.night import NIGHTS_NOTE, NightNote, NightVerdict
from workbench.worker.backends import serving_command

if TYPE_CHECKING:
    from workbench.cluster.run import Machines

STALE = timedelta(hours=20)
"""A night begun longer ago was given up, not interrupted."""
GH_LIMIT_S = 120


@dataclass(frozen=True)
class Night:
    """How it went for one recipe."""

    recipe: str
    machine: str
    since: str
    verdict: NightVerdict
    failures: dict[str, str]
    """Variants that could not be made, with the reason."""

    @property
    def title(self) -> str:
        """The issue's title: the same every night, so that there is one."""
        return f"Nightly regression: {self.recipe} on {self.machine}"

    @property
    def text(self) -> str:
        """How the night went, in words for the log and the issue."""
        words = night.text(self.verdict, self.recipe, self.machine)
        return words + "".join(f"- {name} could not be made: {reason}\n" for name, reason in self.failures.items())


def run(
    recipes: Sequence[Recipe],
    results: store.Place,
    show: Show,
    *,
    site: Path | None = None,
    url: str = "",
    issue: bool = False,
    backends: list[str] | None = None,
    on: Machines | None = None,
    only_on: Sequence[str] = (),
) -> list[Night]:
    """A night of all recipes, in order; each is judged and remembered before the next begins. `on` the machines of a
    cluster all recipes are measured at once, and each is judged on each kind of machine."""
    check_machines(on, only_on)
    nights = []
    waiting = "waiting for another night to end"
    with at_work(show.say), lock(home() / "locks" / "nightly", lambda: show.say(waiting)):
        if on is not None:
            nights = _over(recipes, str(results), show, backends, on, only_on)
        for recipe in recipes if on is None else []:
            nights.append(_one(recipe, results, show, backends))
        if site is not None:
            rows, skipped = store.history(results)
            for warning in store.few(skipped):
                show.say(f"warning: {warning}")
            publish.publish(rows, site, url, serving_command)
        for one in nights if issue else []:
            tell(one, show)
    return nights


def accept(recipe: Recipe, results: store.Place) -> str:
    """Take the latest night's numbers for the new normal; the time it began at.

    Raises `UserError` if there was none.
    """
    here = machine().name
    notes, _ = _notes(results, here, recipe, _rows(results, here, recipe))
    if not notes:
        raise UserError(f"{recipe.name}: no night of this recipe on this machine yet, so nothing to accept")
    note: NightNote = {**notes[-1], "accepted": True}
    store.append_note(results, here, NIGHTS_NOTE, note, _now())
    return str(note["since"])


def tell(one: Night, show: Show) -> None:
    """Open an issue for a bad night, or comment on the open one; close it after a good night.

    Raises `UserError` if GitHub's command line is missing or refuses.
    """
    if shutil.which("gh") is None:
        raise install_with("gh, which opens issues,", "https://cli.github.com")
    listed = _gh("issue", "list", "--state", "open", "--search", f'"{one.title}" in:title', "--json", "number,title")
    try:
        open_ones = [entry["number"] for entry in json.loads(listed) if entry["title"] == one.title]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"gh issue list: not the JSON that was asked for: {listed[:100]!r}") from None
    if one.verdict.alarms:
        if open_ones:
            _gh("issue", "comment", str(open_ones[0]), "--body-file", "-", given=one.text)
            show.say(f"commented on issue {open_ones[0]}")
        else:
            made = _gh("issue", "create", "--title", one.title, "--body-file", "-", given=one.text)
            show.say(f"opened {made.strip()}")
    elif one.verdict.word == "good":
        for number in open_ones:
            _gh("issue", "close", str(number), "--comment", f"A good night: {one.since}.")
            show.say(f"closed issue {number}")


def _one(recipe: Recipe, results: store.Place, show: Show, backends: list[str] | None) -> Night:
    here = machine().name
    store.try_writing(results, here)
    state = _state([recipe.name, str(results)])
    since = _begun(state, show)
    made = pipeline.quantize(recipe, show)
    pipeline.profile(recipe, made, show, results, backends=backends, since=since)

    def again(only: set[tuple[str, str]]) -> list[Row]:
        return pipeline.profile(recipe, made, show, results, backends=backends, again=True, only=only)

    judged = _judged(recipe, here, since, results, show, made.failures, again)
    state.unlink(missing_ok=True)
    return judged


def _over(
    recipes: Sequence[Recipe],
    results: str,
    show: Show,
    backends: list[str] | None,
    on: Machines,
    only_on: Sequence[str],
) -> list[Night]:
    from workbench.cluster import run as cluster
    from workbench.cluster.steps import Wanted

    state = _state([*(recipe.name for recipe in recipes), results, "cluster"])
    since, nights = _begun(state, show), list[Night]()
    wanted = Wanted(backends=backends)
    for outcome in cluster.run(recipes, wanted, on, results, show, only_on=only_on, since=since):
        recipe, made = outcome.recipe, outcome.made
        if made is None:
            # The other recipes are judged all the same.
            nights.append(Night(recipe.name, "any machine", since, night.judge([], [], []), outcome.failures))
            continue
        for kind in sorted({kind for kind, _ in outcome.rows}):

            def again(only: set[tuple[str, str]], recipe: Recipe = recipe, kind: str = kind) -> list[Row]:
                some = replace(wanted, only=frozenset(only))
                return cluster.rows_of(
                    cluster.run([recipe], some, on, results, show, only_on=[kind], since=_next_second())[0]
                )

            nights.append(_judged(recipe, kind, since, results, show, made.failures | outcome.failures, again))
    state.unlink(missing_ok=True)
    return nights


def _judged(
    recipe: Recipe,
    here: str,
    since: str,
    results: store.Place,
    show: Show,
    failures: Mapping[str, str],
    again: Callable[[set[tuple[str, str]]], list[Row]],
) -> Night:
    """What was measured on a kind of machine since the night began, beside the nights before; `again` measures these
    (engine, variant) once more, to be sure."""
    rows = _rows(results, here, recipe)
    notes, skipped = _notes(results, here, recipe, rows)
    for warning in store.few(skipped):
        show.say(f"warning: {warning}")
    while True:
        before = [row for row in rows if row.started_at < since]
        tonight = [row for row in rows if row.started_at >= since]
        verdict = night.judge(before, tonight, notes)
        if not verdict.suspects:
            break
        show.say(f"to be sure, again: {', '.join(pair.label for pair in verdict.suspects)}")
        measured = again({(pair.backend, pair.variant) for pair in verdict.suspects})
        if {*verdict.suspects} - {pair_of(row) for row in measured if not row.error}:
            # What fails now, or is of a workload that the recipe no longer has, is judged by what is known.
            tonight = [row for row in _rows(results, here, recipe) if row.started_at >= since]
            verdict = night.judge(before, [*tonight, *tonight, *tonight], notes)
            break
        rows = _rows(results, here, recipe)
    note = night.note_of(recipe.name, since, _now(), verdict)
    store.append_note(results, here, NIGHTS_NOTE, note, since)
    return Night(recipe.name, here, since, verdict, dict(failures))


def _state(causes: list[str]) -> Path:
    """The note of a night that goes on."""
    return home() / "nights" / f"{digest(causes)}.json"


def _rows(results: store.Place, here: str, recipe: Recipe) -> list[Row]:
    rows, _ = store.history(results)
    own = [row for row in rows if row.base == recipe.model and row.recipe == recipe.name]
    return [row for row in own if store.machine_of(row) == here]


def _notes(results: store.Place, here: str, recipe: Recipe, rows: list[Row]) -> tuple[list[NightNote], list[str]]:
    """The nights of this machine, in its folder and in those of its older names, which its `rows` are of; and the
    warnings of reading them."""
    notes: list[NightNote] = []
    skipped: list[str] = []
    for folder in sorted({here, *(row.machine.name for row in rows)}):
        found, bad = store.read_notes(results, folder, NIGHTS_NOTE, NightNote)
        notes += [note for note in found if note["recipe"] == recipe.name]
        skipped += bad
    return sorted(notes, key=lambda note: note["since"]), skipped


def _begun(state: Path, show: Show) -> str:
    """When this night began: now, or when the one that was interrupted did."""
    now = _now()
    try:
        with open(open_file(state), encoding="utf-8") as stream:
            since = str(json.load(stream)["since"])
        if timedelta(0) <= datetime.fromisoformat(now) - datetime.fromisoformat(since) < STALE:
            show.say(f"taking up the night that began at {since}")
            return since
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # None was interrupted, or its note is half a file.
    now = _next_second()
    state.parent.mkdir(parents=True, exist_ok=True)
    if not state.is_file():
        remove(state)
    write_whole(state, json.dumps({"since": now}))
    return now


def _next_second() -> str:
    """Now, and nothing that was measured before: rows know the second they began in, not more."""
    time.sleep(1.0)
    return _now()


def _gh(*words: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(["gh", *words], input=given, capture_output=True, text=True, timeout=GH_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"gh {' '.join(words[:2])}: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"gh {' '.join(words[:2])}: {last}. Check `gh auth status`")
    return done.stdout


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
