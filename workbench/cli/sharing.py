"""What others see: `publish`, `nightly`, `card`, `push`."""

from __future__ import annotations

import contextlib
import sys

import typer

from workbench.cli import options as o
from workbench.cli.rows import stored
from workbench.console import Console, write


def publish(folder: o.SiteFolder, results: o.Results = o.RESULTS, url: o.SiteUrl = "") -> None:
    """Write a static site: latest tables, history, regressions, a feed and a badge."""
    from workbench.report.site import publish as wing
    from workbench.report.verdicts.causes import spoken
    from workbench.report.verdicts.steps import by_cause
    from workbench.worker.backends import serving_command

    still = wing.publish(stored([results], everything=True), folder, url, serving_command)
    print(folder / "index.html")
    for group in by_cause(still):
        first = group[0]
        where = ", ".join(dict.fromkeys(wing.path_of(step.series.machine, step.series.recipe) for step in group))
        print(
            f"{first.series.pair.backend} on {first.series.machine} since {first.first.at[:10]}: {len(group)} worse "
            f"({where}); {spoken(step.changed for step in group)}"
        )
        for step in group:
            print(f"  {step.series.label}: {step.metric} {step.relative:+.1%}")


def nightly(
    recipes: o.Recipes,
    results: o.Results = o.RESULTS,
    site: o.NightlySite = None,
    url: o.NightlyUrl = "",
    issue: o.Issue = False,
    accept: o.Accept = False,
    backend: o.OnlyBackends = None,
    quiet: o.Quiet = False,
    on: o.On = None,
    store: o.Store = None,
    machines: o.OnMachines = None,
) -> None:
    """Measure recipes anew and compare with the good nights before; exit with 1 if something got worse."""
    from workbench import nightly as wing
    from workbench import shared
    from workbench.recipe.load import load

    loaded = [load(recipe) for recipe in recipes]
    if accept:
        for recipe in loaded:
            print(f"{recipe.name}: the night of {wing.accept(recipe, results)} is the new normal")
        return
    with shared.using(store), contextlib.ExitStack() as left:
        there, place = None, results
        if on is not None:
            from workbench.cluster import run as cluster

            there, place = (
                left.enter_context(contextlib.closing(cluster.on(on))),
                cluster.rows_place(None if results == o.RESULTS else results),
            )
        nights = wing.run(
            loaded,
            place,
            Console(quiet),
            site=site,
            url=url,
            issue=issue,
            backends=backend,
            on=there,
            only_on=o.words(machines),
        )
    for night in nights:
        sys.stdout.write(night.text)
    raise typer.Exit(1 if any(night.verdict.alarms or night.failures for night in nights) else 0)


def card(
    variant: o.MadeVariant,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    licence: o.Licence = None,
    author: o.Author = "",
    output: o.Output = None,
) -> None:
    """Write a variant's model card: front matter for the hub, the measured table, provenance, licence."""
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = stored([results])
    row = cards.find(rows, variant, recipe)
    write(output, cards.card(rows, row, licence or wing.licence_of(row, rows), author))


def push(
    variant: o.MadeVariant,
    repository: o.Repository,
    results: o.Results = o.RESULTS,
    recipe: o.OnlyRecipe = None,
    licence: o.Licence = None,
    author: o.Author = "",
    private: o.Private = False,
    anyway: o.Anyway = False,
) -> None:
    """Upload a variant with its card to the hub, if the base's licence permits it."""
    from workbench.cache import at_work
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = stored([results])
    row = cards.find(rows, variant, recipe)
    with at_work(Console().say):
        print(wing.push(rows, row, repository, licence=licence, author=author, private=private, anyway=anyway))
