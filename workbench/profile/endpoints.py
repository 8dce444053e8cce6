"""A recipe's endpoints: each a row beside those of the engines that the workbench runs, measured after these."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from workbench.console import Show
from workbench.errors import UserError
from workbench.profile.beside import Beside
from workbench.profile.endpoint import check_remote, measure_endpoint, planned, store_row
from workbench.profile.under_load import Wish
from workbench.quantize.make import Made
from workbench.recipe.endpoints import Endpoint
from workbench.recipe.load import Recipe
from workbench.records import Reference, Row, Workload, to_json
from workbench.serving.address import address_of


@dataclass(frozen=True)
class Planned:
    """An endpoint and its row before it is asked."""

    endpoint: Endpoint
    wish: Wish
    beside: Beside
    row: Row


def planned_endpoints(
    recipe: Recipe,
    made: Made,
    reference: str | None,
    variants: Collection[str] | None,
    only: Collection[tuple[str, str]] | None,
) -> Iterator[Planned]:
    """The recipe's endpoints: of these variants, of these (engine, variant); None: all."""
    wish = _wish_of(recipe.workload)
    for number, (name, each) in enumerate(recipe.endpoints.items()):
        if variants is not None and each.variant not in variants:
            continue
        said = {"model": each.model, "price": to_json(each.price.model_dump()) if each.price else None}
        beside = Beside(
            recipe,
            made,
            reference=reference,
            variant=each.variant,
            name=name,
            options={key: value for key, value in said.items() if value is not None},
            # After all pairs of variants and engines.
            place=len(recipe.variants) * len(recipe.backends) + number,
        )
        row = planned(name, address_of(each.url), wish, beside)
        if only is None or (row.backend, row.artifact.variant) in only:
            yield Planned(each, wish, beside, row)


def measure_planned(
    one: Planned, references: dict[str, Reference] | None, results: Path | str, yes_remote: bool, show: Show
) -> Row:
    """The endpoint's row, stored under `results`; with an error where it cannot be asked."""
    try:
        address = address_of(one.endpoint.url, one.endpoint.api_key_env)
        check_remote(address, one.wish, yes_remote, one.beside.recipe)
        beside = replace(one.beside, references=references)
        return measure_endpoint(
            address, one.endpoint.model, one.endpoint.api_key_env, one.wish, results, show, beside=beside
        )
    except UserError as problem:
        row = replace(one.row, error=str(problem))
        store_row(row, results)
        show.say(f"endpoint {one.beside.name} failed: {problem}")
        return row


def _wish_of(load: Workload) -> Wish:
    """A recipe's workload as a server is asked: its first prompt length, and so many at once where it has requests."""
    return Wish(
        prompt_tokens=load.prompt_tokens[0],
        new_tokens=load.new_tokens,
        concurrency=load.batches if load.requests else (),
        requests=load.requests * max(load.batches),
        repeats=load.repeats,
        seed=load.seed,
        as_asked=load,
    )
