"""What makes and measures: `run`, `quantize`, `profile`, `plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from workbench import api
from workbench.cli import options as o
from workbench.cli.rows import check_format
from workbench.console import write
from workbench.errors import UserError, check_known
from workbench.report.formats import FILE_FORMATS, FORMATS

if TYPE_CHECKING:
    from workbench.records import Artifact


def run(
    recipe: o.RecipeFile,
    results: o.Results = o.RESULTS,
    backend: o.OnlyBackends = None,
    variant: o.OnlyVariants = None,
    again: o.Again = False,
    format: o.TableFormat = "terminal",
    quiet: o.Quiet = False,
    yes_remote: o.YesRemote = False,
    on: o.On = None,
    store: o.Store = None,
    machines: o.OnMachines = None,
) -> None:
    """Quantize, profile and print the table."""
    from workbench.cli import hints

    check_format(format)
    done = api.run(
        recipe,
        results,
        backends=backend,
        variants=variant,
        again=again,
        yes_remote=yes_remote,
        quiet=quiet,
        on=on,
        store=store,
        machines=o.words(machines),
    )
    write(None, FILE_FORMATS[format](done.rows) if format in FILE_FORMATS else FORMATS[format](done.table))
    if format == "terminal" and not quiet:
        hints.after_run(recipe, str(done.results), done.rows, store)
    raise typer.Exit(1 if done.failures else 0)


def quantize(
    recipe: o.RecipeFile,
    variant: o.OnlyVariants = None,
    output: o.Copies = None,
    quiet: o.Quiet = False,
    on: o.On = None,
    store: o.Store = None,
    machines: o.OnMachines = None,
) -> None:
    """Make every variant of a recipe, and say where it is."""
    from workbench.cli import hints
    from workbench.sizes import mib_text

    made = api.quantize(recipe, variants=variant, quiet=quiet, on=on, store=store, machines=o.words(machines))
    for name, artifacts in made.artifacts.items():
        for artifact in artifacts:
            bits = f"{artifact.bits_per_weight:.2f} bits/weight" if artifact.bits_per_weight else ""
            own = name != "base" and not artifact.provenance.get("loaded")
            path = _place_of(artifact, output, store) if own else artifact.path
            print(f"{name:32} {bits:22} {mib_text(artifact.disk_bytes):>13}  {path}")
            for warning in artifact.warnings:
                print(f"{'':32} warning: {warning}")
    for name, reason in made.refused.items():
        print(f"{name:32} {reason}")
    for name, reason in made.failures.items():
        print(f"{name:32} failed: {reason}", file=sys.stderr)
    if not quiet:
        hints.after_quantize(recipe, output is not None)
    raise typer.Exit(1 if made.failures else 0)


def _place_of(artifact: Artifact, output: Path | None, store: str | None) -> Path | str:
    """Where an artifact is: its copy in `output`; the cache; or the store, if another machine made it."""
    from workbench import shared
    from workbench.home import bring
    from workbench.quantize.handing import copy_to

    with shared.using(store):
        if output:
            bring(artifact.path)
            return copy_to(output, artifact)
        return artifact.path if Path(artifact.path).exists() else shared.place_of("artifacts", artifact.digest) or ""


def profile(
    recipe: o.SomeRecipe = None,
    results: o.Results = o.RESULTS,
    backend: o.OnlyBackends = None,
    variant: o.OnlyVariants = None,
    again: o.Again = False,
    format: o.TableFormat = "terminal",
    quiet: o.Quiet = False,
    endpoint: o.Endpoint = None,
    model: o.EndpointModel = None,
    api_key_env: o.KeyVariable = None,
    yes_remote: o.YesRemote = False,
    concurrency: o.AtOnce = None,
    rate: o.Rates = None,
    arrivals: o.Arrivals = "poisson",
    slo: o.Slo = None,
    prompt_tokens: o.PromptTokens = 512,
    new_tokens: o.NewTokens = 64,
    requests: o.Requests = 100,
    on: o.On = None,
    store: o.Store = None,
    machines: o.OnMachines = None,
) -> None:
    """Run every variant in every engine and store what is measured; or measure a server that is already there."""
    from workbench.home import recipe_or_last

    if endpoint is None:
        if model or api_key_env or concurrency or rate or slo:
            raise UserError(
                "--model, --api-key-env, --concurrency, --rate and --slo are about a server: --endpoint URL"
            )
        run(recipe_or_last(recipe), results, backend, variant, again, format, quiet, yes_remote, on, store, machines)
        return
    if backend or (variant and (recipe is None or len(variant) > 1)):
        raise UserError(
            "--endpoint measures one server: leave out --backend, and name by --variant only which one of a recipe it "
            "serves"
        )
    check_format(format)
    row = api.profile_endpoint(
        endpoint,
        results,
        model=model,
        api_key_env=api_key_env,
        yes_remote=yes_remote,
        concurrency=concurrency or (4, 16),
        rates=rate or (),
        arrivals=arrivals,
        limits=slo or (),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=requests,
        recipe=recipe,
        variant=variant[0] if variant else None,
        quiet=quiet,
    )
    shown = FILE_FORMATS[format]([row]) if format in FILE_FORMATS else FORMATS[format](api.table([row]))
    write(None, shown)
    raise typer.Exit(1 if row.error else 0)


def plan(
    recipe: o.RecipeFile,
    memory: o.Memory = None,
    context: o.Context = None,
    batch: o.Batch = None,
    device: o.Device = None,
    layers: o.Layers = False,
    format: o.TextFormat = "terminal",
) -> None:
    """What each variant will need in each engine, and what fits, before anything is made; exit 1 if nothing fits."""
    from workbench.plan import formats

    check_known("format", format, formats.FORMATS)
    loaded = api.load(recipe)
    if loaded.base.hub and format == "terminal":
        print(f"reading what the hub has of {loaded.base.hub}: its configuration and headers", file=sys.stderr)
    if layers:
        sys.stdout.write(formats.layers(api.layers(loaded), format))
        return
    made = api.plan(loaded, memory=memory, context=context, batch=batch, device=device)
    sys.stdout.write(formats.FORMATS[format](made))
    raise typer.Exit(0 if any(need.fits for need in made.needs) else 1)
