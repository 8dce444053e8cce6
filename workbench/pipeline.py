"""The program in one screen: recipe -> artifacts -> rows.

Each job of `profile` is one artifact in one engine, in a process of its own. Jobs are timed in interleaved rounds, one
at work at a time. A row is stored the moment its job ends, whether it succeeded, failed or cannot run, and what is
already measured on this machine is not measured again. Before the first job that scores tokens the base's own
distributions are recorded, the reference that every divergence of the recipe is measured from.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from workbench.console import Show
from workbench.engines import crowded, idle_gpu
from workbench.home import WAITING, holder, home, lock, remember, who
from workbench.machine.identity import machine
from workbench.profile.beside import Beside
from workbench.profile.endpoints import measure_planned, planned_endpoints
from workbench.profile.jobs import already_measured, harness_missing, is_scored, pairs_of, planned_row
from workbench.profile.measure import portable_row, run_job
from workbench.profile.outlook import Outlook
from workbench.profile.reference import all_references, reference_key, reference_keys, with_reference
from workbench.profile.rounds import Interleaved, room_beside
from workbench.quantize.make import Made, make
from workbench.recipe.load import Recipe
from workbench.records import Reference, Row
from workbench.report import store
from workbench.report.selection import engine_texts, pair_of


def quantize(recipe: Recipe, show: Show, names: set[str] | None = None) -> Made:
    """Make what the recipe names, or find it made; remembered as this machine's last recipe."""
    take_up(recipe, show)
    return make(recipe, show, names)


def take_up(recipe: Recipe, show: Show) -> None:
    """Say what is odd about a recipe that is to be made, and remember it."""
    for warning in recipe.warnings:
        show.say(f"note: {warning}")
    remember(recipe.path)


def beside(recipe: Recipe, variant: str | None, show: Show) -> Beside:
    """What of a recipe a server is measured with that the recipe does not name; `variant`: which of it the server
    serves."""
    made = make(recipe, show, {variant} if variant else set())
    keys = reference_keys(recipe, made)
    references = all_references(recipe, made, keys, show) if made.evaluations else None
    return Beside(recipe, made, references, reference_key(keys) if references else None, variant)


def profile(
    recipe: Recipe,
    made: Made,
    show: Show,
    results: Path | str,
    *,
    backends: list[str] | None = None,
    variants: list[str] | None = None,
    again: bool = False,
    since: str = "",
    only: Collection[tuple[str, str]] | None = None,
    yes_remote: bool = False,
) -> list[Row]:
    """Measure every pair of artifact and backend that the recipe asks for, then its endpoints; returns their rows in
    order.

    What was measured at `since` (RFC 3339, UTC) or later is not measured again, nor anything ever measured if it
    is empty; with `again`, everything is. `only`: these (backend, variant) and no others, not even the base. Of
    `backends` no endpoint is one. `yes_remote`: endpoints may be on other machines.
    """
    here = machine()
    folder = store.under(results, here.name)
    before, skipped = ([], []) if again else store.read(results)
    asked_before = already_measured(before, since)
    before = [row for row in before if store.machine_of(row) == here.name]
    for warning in store.few(skipped):
        show.say(f"warning: {warning}")
    measured, failed = already_measured(before, since), {(row.key, row.started_at) for row in before if row.error}
    pairs, keys = list(pairs_of(recipe, backends, variants)), reference_keys(recipe, made)
    key = reference_key(keys)
    for name, reason in harness_missing(made, {choice.name for choice, _ in pairs}).items():
        show.say(f"note: {reason} ({name})")
    for told in dict.fromkeys(crowded(choice.name, choice.options) for choice, _ in pairs):
        if told:
            show.say(f"note: {told}")
    for name in dict.fromkeys(choice.name for choice, _ in pairs):
        if told := idle_gpu(name):
            show.say(f"note: {told}")
    planned = [planned_row(recipe, made, choice, name, key) for choice, name in pairs]
    chosen = recipe.matching(variants) if variants else None
    there = [] if backends else [*planned_endpoints(recipe, made, key, chosen, only)]
    references: dict[str, Reference] | None = None
    unmeasured = [row for row in planned if row.key not in measured]
    unmeasured += [each.row for each in there if each.row.key not in asked_before]
    if any(map(is_scored, unmeasured)):
        references = all_references(recipe, made, keys, show)
        if references is None:
            # Their rows will be without divergence and must not pass for rows with it.
            bare = [planned_row(recipe, made, choice, name, None) for choice, name in pairs]
            planned = [row if row.key in measured else other for row, other in zip(planned, bare, strict=True)]
            there = [] if backends else [*planned_endpoints(recipe, made, None, chosen, only)]
        measured = with_reference(measured, references)
    order = [place for place, (choice, name) in enumerate(pairs) if only is None or (choice.name, name) in only]
    rows = {place: measured[planned[place].key] for place in order if planned[place].key in measured}
    # A machine that drifts (heat, other work) must not make the later variants look slower; the same order each time.
    random.Random(f"{recipe.name} {recipe.workload.seed}").shuffle(order)

    to_do = [planned[place] for place in order if planned[place].key not in measured]
    if order and not to_do:
        last = max(measured[planned[place].key].started_at for place in order)
        show.say(f"nothing to do: all {len(order)} pairs were measured before, the last {last}; --again measures anew")
    engines = engine_texts(planned)
    outlook = Outlook([row for row in to_do if not row.error and not row.unsupported], engines, show)

    def in_place() -> list[Row]:
        return [rows[place] for place in sorted(rows)]

    def store_row(row: Row) -> None:
        store.append(results, here.name, portable_row(row))
        rows[row.place] = row
        if row.error:
            show.say(f"{row.artifact.variant} on {engines[pair_of(row)]} failed: {row.error}")

    def ended(row: Row) -> None:
        store_row(row)
        outlook.ended(row, len(jobs), in_place())

    waited = False
    with Interleaved(ended) as jobs, outlook:

        def wait(file: Path) -> None:
            nonlocal waited
            waited = True
            show.say(f"{WAITING}, which measures the same{holder(file)}")
            # Whoever has the lock may be waiting for one of these.
            jobs.finish()

        for place in order:
            row = replace(planned[place], place=place)
            if row.key in measured:
                rows[place] = measured[row.key]
                continue
            waited = False
            with contextlib.ExitStack() as locks:
                file = home() / "locks" / f"row-{row.key}"
                step = f"{row.artifact.variant} on {engines[pair_of(row)]}"
                locks.enter_context(lock(file, partial(wait, file), note=who(step)))
                # Another run may have stored it in the meantime; then its failure counts too.
                # To read a bucket again for each row would take longer than the rows: there only if it was waited for.
                if not again and (waited or isinstance(folder, Path)):
                    measured |= with_reference(already_measured(store.read(folder)[0], since, failed), references)
                if row.key in measured:
                    rows[place] = measured[row.key]
                    outlook.ended(None, len(jobs), in_place())
                elif row.error or row.unsupported:
                    store_row(row)
                else:
                    if not room_beside(row):
                        jobs.finish()
                    jobs.start(run_job(recipe, made, row, references, engines[pair_of(row)], show), locks.pop_all())
                    outlook.waiting(len(jobs))
        jobs.finish()
    answered = [
        asked_before.get(each.row.key) or measure_planned(each, references, results, yes_remote, show) for each in there
    ]
    return [*in_place(), *answered]
