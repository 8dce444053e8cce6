"""What a program calls: each subcommand that makes, measures or reads as a function with typed results.

    import workbench as wb

The command line calls the same functions. Whatever a person can mend raises `UserError`, in one line that says what
to do. Stored rows are named by folder, file or URL, or given as rows. What a function needs is imported
when it is called.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UserError, check_known

if TYPE_CHECKING:
    from workbench.plan.need import Plan
    from workbench.quantize.make import Made
    from workbench.recipe.load import Recipe
    from workbench.records import LayerKind, Row
    from workbench.report.cost import Costs
    from workbench.report.table import Table
    from workbench.report.verdicts.compare import Comparison
    from workbench.report.verdicts.recommend import Recommendation

RESULTS = "results"
"""The folder that rows are stored in by default."""
Place = Path | str
"""A file, folder or URL of stored rows."""


@dataclass(frozen=True)
class Run:
    """What a run made and measured."""

    made: Made
    rows: tuple[Row, ...]
    """A row for each variant in each engine, those measured before among them."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Steps on other machines that came to nothing, and why."""
    results: Place = RESULTS
    """Where the rows are stored."""

    def __str__(self) -> str:
        return str(self.table)

    @property
    def table(self) -> Table:
        """The rows seen together."""
        return table(self.rows)

    @property
    def failures(self) -> dict[str, str]:
        """Reasons, by variant that could not be made and by `variant on engine` that could not be measured."""
        jobs = {f"{row.artifact.variant} on {row.backend}": row.error for row in self.rows if row.error}
        return {**self.made.failures, **jobs, **self.lost}


def load(recipe: Place | Recipe) -> Recipe:
    """A recipe, read and checked; nothing else is touched."""
    from workbench.recipe.load import Recipe
    from workbench.recipe.load import load as read

    return recipe if isinstance(recipe, Recipe) else read(recipe)


def run(
    recipe: Place | Recipe,
    results: Place = RESULTS,
    *,
    backends: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    again: bool = False,
    yes_remote: bool = False,
    quiet: bool = True,
    on: str | None = None,
    store: str | None = None,
    machines: Sequence[str] = (),
) -> Run:
    """Make every variant of a recipe, measure each in every engine, store the rows under `results`.

    `backends`: only these engines; `variants`: only these (or patterns, `gguf-*`), and the base to compare them with.
    What was made or measured before is not done again; with `again` it is measured again. `yes_remote`: the recipe's
    endpoints may be on other machines, which are sent its texts. Unless `quiet`, progress is told on standard error. A
    job that fails is a row with its error, and the others go on.

    `on`: not here but on the machines of a cluster (`ray`, `ray://HOST:PORT`), those of `machines` (kinds or labels;
    default: the recipe's, or all of the kind of which there are most), which share `store` (a URL or folder).
    """
    from workbench import cache, pipeline, shared
    from workbench.cluster import check_machines
    from workbench.console import Console
    from workbench.machine.identity import machine
    from workbench.report.store import try_writing

    check_machines(on, machines)
    loaded = load(recipe)
    for name in backends or []:
        loaded.backend(name)  # A misspelt one is refused before any work.
    chosen, only = loaded.matching(list(variants)) if variants else None, list(variants) if variants else None
    show, engines = Console(quiet), list(backends) if backends else None
    with shared.using(store):
        if on is not None:
            from workbench.cluster import run as cluster
            from workbench.cluster.steps import Wanted

            wanted = Wanted(chosen, engines, only)
            named = None if results == RESULTS else str(results)
            over = cluster.one(loaded, wanted, on, named, machines, show, again=again, yes_remote=yes_remote)
            return Run(over.made_at_all, tuple(cluster.rows_of(over)), over.failures, over.results)
        with cache.at_work(show.say):
            try_writing(results, machine().name)
            made = pipeline.quantize(loaded, show, chosen)
            measured = pipeline.profile(
                loaded, made, show, results, backends=engines, variants=only, again=again, yes_remote=yes_remote
            )
    return Run(made, tuple(measured), results=results)


def profile(
    recipe: Place | Recipe | None = None,
    results: Place = RESULTS,
    *,
    backends: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    again: bool = False,
    yes_remote: bool = False,
    quiet: bool = True,
) -> Run:
    """`run`, of the recipe last quantized on this machine if none is named."""
    from workbench.home import recipe_or_last

    chosen = recipe_or_last(None) if recipe is None else recipe
    return run(chosen, results, backends=backends, variants=variants, again=again, yes_remote=yes_remote, quiet=quiet)


def profile_endpoint(
    url: str,
    results: Place = RESULTS,
    *,
    model: str | None = None,
    api_key_env: str | None = None,
    yes_remote: bool = False,
    concurrency: Sequence[int] = (4, 16),
    rates: Sequence[float] = (),
    arrivals: str = "poisson",
    limits: Sequence[str] = (),
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    requests: int = 100,
    recipe: Place | Recipe | None = None,
    variant: str | None = None,
    quiet: bool = True,
) -> Row:
    """Measure a server that speaks the OpenAI API, one answer at a time and under load; its row is stored and returned.

    `api_key_env`: the variable that holds its key; `yes_remote`: it may be another machine; `concurrency`: so many
    requests at once, each a point; `rates`: so many a second, which arrive `poisson` or `constant`; `limits`: as
    `ttft:500ms`, for goodput and the largest rate that keeps them; `requests`: of each point. A server that dies under
    load leaves a row with its error and what was measured before. `recipe`: on whose texts and tasks its quality is
    measured as far as it tells log-probabilities, and whose `variant` it serves.
    """
    from workbench import cache, pipeline
    from workbench.console import Console
    from workbench.profile import endpoint as wing
    from workbench.report.store import try_writing
    from workbench.serving.address import address_of

    address, show = address_of(url, api_key_env), Console(quiet)
    wish = wing.wish_of(concurrency, rates, arrivals, limits, prompt_tokens, new_tokens, requests)
    loaded = load(recipe) if recipe is not None else None
    if loaded and variant:
        loaded.variant(variant)
    wing.check_remote(address, wish, yes_remote, loaded)
    try_writing(results, wing.machine_at(address).name)
    if loaded is None:
        return wing.measure_endpoint(address, model, api_key_env, wish, results, show)
    with cache.at_work(show.say):
        beside = pipeline.beside(loaded, variant, show)
        return wing.measure_endpoint(address, model, api_key_env, wish, results, show, beside=beside)


def quantize(
    recipe: Place | Recipe,
    *,
    variants: Sequence[str] | None = None,
    quiet: bool = True,
    on: str | None = None,
    store: str | None = None,
    machines: Sequence[str] = (),
) -> Made:
    """Make the variants of a recipe (`variants`: only these, or patterns); `artifacts` says where each is. `on`,
    `store` and `machines` as in `run`."""
    from workbench import cache, pipeline, shared
    from workbench.cluster import check_machines
    from workbench.console import Console

    check_machines(on, machines)
    loaded, show = load(recipe), Console(quiet)
    chosen = loaded.matching(list(variants)) if variants else None
    with shared.using(store):
        if on is not None:
            from workbench.cluster import run as cluster
            from workbench.cluster.steps import Wanted

            return cluster.one(loaded, Wanted(chosen, measure=False), on, None, machines, show).made_at_all
        with cache.at_work(show.say):
            return pipeline.quantize(loaded, show, chosen)


def rows(*results: Place, history: bool = False, say: Callable[[str], None] = warnings.warn) -> list[Row]:
    """Stored rows (default: of the folder `results`), the latest of each job; with `history` all of them.

    `say` is told of lines that are none.
    """
    from workbench.report import store

    found, bad = (store.history if history else store.read)(*(results or (RESULTS,)))
    for warning in store.few(bad):
        say(warning)
    return found


def table(
    results: Place | Sequence[Place] | Sequence[Row] = RESULTS,
    *,
    machine: str | None = None,
    recipe: str | None = None,
    evaluation: str | None = None,
) -> Table:
    """The newest comparable rows as one table, or those of the machine, recipe or evaluation named."""
    from workbench.report.table import build

    return build(_rows(results), machine=machine, recipe=recipe, evaluation=evaluation)


def compare(
    old: Place | Sequence[Row],
    new: Place | Sequence[Row],
    results: Place | Sequence[Row] = RESULTS,
    *,
    thresholds: Mapping[str, float] | None = None,
    machine: str | None = None,
    recipe: str | None = None,
    evaluation: str | None = None,
    measurement_version: int | None = None,
    say: Callable[[str], None] = warnings.warn,
) -> Comparison:
    """Two sets of rows, metric by metric: better, worse, same or undecided.

    Each set: rows, a file, folder or URL of them, or a date or a commit, which is looked for in `results`; or both a
    variant there, as `"gguf-Q4_K_M", "gguf-Q5_K_M"`: the second beside the first, engine by engine.
    `thresholds`: the relative change that matters, by metric, as `{"decode_tok_s": 0.05}`. `say` is told
    of lines that are no rows.
    """
    from workbench.report.verdicts import compare as wing

    known = _rows(results, True, say) if _absent(old) or _absent(new) else []
    if not known and (_absent(old) or _absent(new)):
        raise UserError(f"{results}: nothing measured yet, so no date or commit to choose")
    limits = dict(thresholds or {})
    if _absent(old) and _absent(new) and {str(old), str(new)} & {row.artifact.variant for row in known}:
        of_both = wing.of_variants(known, str(old), str(new), machine, recipe, evaluation)
        return wing.compare(*of_both, thresholds=limits)
    before, after = (wing.select(known, str(spec)) if _absent(spec) else _rows(spec, True, say) for spec in (old, new))
    only = {"machine": machine, "evaluation": evaluation, "recipe": recipe}
    return wing.compare(before, after, thresholds=limits, measurement_version=measurement_version, **only)


def cost(
    prices: Place,
    results: Place | Sequence[Place] | Sequence[Row] = RESULTS,
    *,
    limits: Sequence[str] = (),
    machine: str | None = None,
    recipe: str | None = None,
) -> Costs:
    """What tokens cost on the machines of stored rows and at APIs, by the prices of a YAML file (docs: Servers).

    `limits`: as `ttft:500ms`, what a request must keep to count; without any, each row's own. `str()` of it is the
    table with its assumptions; `month_of` an offer is its cost at another traffic.
    """
    from workbench.profile.endpoint import limits_of
    from workbench.recipe.prices import load_prices, with_endpoints
    from workbench.report.cost import costs

    found = load_prices(prices)
    rows = [row for row in _rows(results) if recipe in (None, row.recipe) and machine in (None, row.machine.name)]
    asked = {f"{row.artifact.variant} at {row.options['url']}": row.options for row in rows if "url" in row.options}
    return costs(rows, with_endpoints(found, asked), limits_of(limits))


def recommend(
    results: Place | Sequence[Place] | Sequence[Row] = RESULTS,
    *,
    memory: str | int | None = None,
    max_size: str | int | None = None,
    max_perplexity: str | float | None = None,
    max_kld: float | Mapping[str, float] | None = None,
    min_accuracy: float | Mapping[str, float] | None = None,
    min_decode: float | None = None,
    min_prefill: float | None = None,
    min_served: float | None = None,
    batch: int | None = None,
    context: int | None = None,
    backend: str | None = None,
    sort: str = "speed",
    machine: str | None = None,
    recipe: str | None = None,
) -> Recommendation:
    """The variant and engine to use under limits, the command that serves it, and why not the others.

    `memory`, `max_size`: bytes, or as `"8GiB"`; `max_perplexity`: `"1%"` more than the base's, or the value itself;
    `max_kld`: nats a token, on the first evaluation set or by set; `min_accuracy`: a share, at all tasks or by task;
    `min_decode`, `min_prefill`, `min_served`: tokens a second, with `batch` sequences at once of at least `context`
    tokens; `sort`: by `speed`, `quality`, `memory` or `size`. `choice` is None if nothing fits.
    """
    from workbench.home import home
    from workbench.report.verdicts import recommend as wing
    from workbench.worker.backends import serving_command

    limit = None if max_perplexity is None else str(max_perplexity)
    relative, value = wing.parse_share(limit, "--max-perplexity") if limit else (None, None)
    constraints = wing.Constraints(
        memory_bytes=_bytes(memory, "--memory"),
        size_bytes=_bytes(max_size, "--max-size"),
        max_perplexity=relative,
        max_perplexity_value=value,
        max_kld=max_kld,
        min_accuracy=min_accuracy,
        min_decode_tok_s=min_decode,
        min_prefill_tok_s=min_prefill,
        min_served_tok_s=min_served,
        batch=batch,
        context=context,
        backend=backend,
        sort=sort,
    )
    seen = table(results, machine=machine, recipe=recipe)
    return wing.recommend(seen, constraints, lambda row: serving_command(row, str(home())))


def plan(
    recipe: Place | Recipe,
    *,
    memory: str | int | None = None,
    context: int | None = None,
    batch: int | None = None,
    device: str | None = None,
) -> Plan:
    """What each variant will need in each engine, and what fits, before anything is made.

    `memory`: bytes, or as `"24GiB"`, default: this machine's; `context`: tokens of a sequence, prompt and new ones;
    `batch`: sequences at once; `device`: `cpu` or `cuda`, default what is here.
    """
    from workbench.plan import make as wing

    if device is not None:
        check_known("device", device, ["cpu", "cuda"])
    cuda = None if device is None else device == "cuda"
    return wing.make(load(recipe), memory_bytes=_bytes(memory, "--memory"), context=context, batch=batch, cuda=cuda)


def layers(recipe: Place | Recipe) -> list[LayerKind]:
    """Which linear layers of the base's decoder layers share an input, and what produces it, by kind of layer."""
    from workbench.plan import make as wing

    return wing.layers(load(recipe))


def _rows(
    results: Place | Sequence[Place] | Sequence[Row],
    history: bool = False,
    say: Callable[[str], None] = warnings.warn,
) -> list[Row]:
    from workbench.records import Row

    either = [results] if isinstance(results, Path | str) else results
    given = [each for each in either if isinstance(each, Row)]
    places = [each for each in either if not isinstance(each, Row)]
    for place in places:
        if str(place) != RESULTS and _absent(place):
            raise UserError(f"{place}: nothing measured yet, there is no such file or folder. Name a results folder")
    return given + (rows(*places, history=history, say=say) if places else [])


def _absent(spec: Place | Sequence[Row]) -> bool:
    """Whether it is neither rows nor a place that is there: a date or a commit, or a slip."""
    return isinstance(spec, Path | str) and "://" not in str(spec) and not os.path.exists(spec)


def _bytes(size: str | int | None, option: str) -> int | None:
    from workbench.sizes import parse_size

    return parse_size(size, option) if isinstance(size, str) else size
