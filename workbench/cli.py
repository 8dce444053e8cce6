"""The command line: one function a subcommand, each a single library call.

Nothing heavy is imported here at top level, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench import __version__
from workbench.errors import UserError, WorkFailed, unknown
from workbench.report.formats import FILE_FORMATS, FORMATS

if TYPE_CHECKING:
    from workbench.records import Row


def _either(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


app = typer.Typer(
    name="workbench",
    help="Quantize a language model every way, run it in every engine, compare what comes out.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/smollm2-135m.yaml.", show_default=False)]
SomeRecipe = Annotated[
    Path | None,
    typer.Argument(help="A recipe; without one, that last quantized on this machine.", show_default=False),
]
Results = Annotated[str, typer.Option("--results", help="The folder, or URL of one, that rows are stored in.")]
Backends = Annotated[
    list[str] | None,
    typer.Option("--backend", "-b", help="Only this engine; may be given several times.", show_default=False),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        "-v",
        help="Only this variant (or 'gguf-*'), and the base to compare it with; may be repeated.",
        show_default=False,
    ),
]
SomeRows = Annotated[
    list[str] | None,
    typer.Argument(help="Files, folders or URLs of rows; default: the results folder.", show_default=False),
]
Again = Annotated[bool, typer.Option("--again", help="Measure again what is already measured.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write to this file instead of printing.", show_default=False)
]
Format = Annotated[str, typer.Option("--format", "-f", help=f"{_either(FORMATS)}.")]
RESULTS = "results"


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"workbench {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    results: Results = RESULTS,
    backend: Backends = None,
    variant: Variants = None,
    again: Again = False,
    format: Format = "terminal",
    quiet: Quiet = False,
) -> None:
    """Quantize, profile and print the table."""
    from workbench import pipeline
    from workbench.console import Console
    from workbench.recipe.load import load

    render = _renderer(format)
    loaded = load(recipe)
    for name in backend or []:
        loaded.backend(name)  # A misspelt one is refused before any work.
    made = pipeline.quantize(loaded, Console(quiet), _named(loaded, variant))
    rows = pipeline.profile(loaded, made, Console(quiet), results, backends=backend, variants=variant, again=again)
    render(rows)
    raise typer.Exit(1 if made.failures or any(row.error for row in rows) else 0)


@app.command()
def quantize(recipe: RecipeFile, variant: Variants = None, quiet: Quiet = False) -> None:
    """Make every variant of a recipe, and say where it is."""
    from workbench import pipeline
    from workbench.console import Console
    from workbench.recipe.load import load

    loaded = load(recipe)
    made = pipeline.quantize(loaded, Console(quiet), _named(loaded, variant))
    for name, artifacts in made.artifacts.items():
        for artifact in artifacts:
            bits = f"{artifact.bits_per_weight:.2f} bits/weight" if artifact.bits_per_weight else ""
            print(f"{name:32} {bits:22} {artifact.disk_bytes / 2**20:9.1f} MiB  {artifact.path}")
            for warning in artifact.warnings:
                print(f"{'':32} warning: {warning}")
    for name, reason in made.failures.items():
        print(f"{name:32} failed: {reason}", file=sys.stderr)
    raise typer.Exit(1 if made.failures else 0)


@app.command()
def profile(
    recipe: SomeRecipe = None,
    results: Results = RESULTS,
    backend: Backends = None,
    variant: Variants = None,
    again: Again = False,
    format: Format = "terminal",
    quiet: Quiet = False,
) -> None:
    """Run every variant in every engine and store what is measured."""
    run(_recipe(recipe), results, backend, variant, again, format, quiet)


@app.command()
def table(
    rows: SomeRows = None,
    results: Results = RESULTS,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    machine: Annotated[str | None, typer.Option(help="Only rows of the machine of this name.")] = None,
    format: Annotated[
        str, typer.Option("--format", "-f", help=f"As for run, or {_either(FILE_FORMATS)}.")
    ] = "terminal",
    output: Output = None,
) -> None:
    """Print the comparison table of stored rows; as Parquet, the rows of all machines and evaluations."""
    from workbench.report.table import build

    if format in FILE_FORMATS:
        if output is None and sys.stdout.isatty():
            raise UserError(f"{format.capitalize()} is not for a terminal: name a file with --output rows.{format}")
        found = [row for row in _stored(rows or [results]) if recipe in (None, row.recipe)]
        _write(output, FILE_FORMATS[format]([row for row in found if machine in (None, row.machine.get("name"))]))
        return
    render = _renderer(format, output)
    render(build(_stored(rows or [results]), machine=machine, recipe=recipe))


@app.command()
def compare(
    old: Annotated[str, typer.Argument(metavar="A", help="A file, folder or URL of rows, a date or a commit.")],
    new: Annotated[str, typer.Argument(metavar="B", help="The same, for the later ones.")],
    results: Results = RESULTS,
    fail: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 if this metric is worse by this much, as decode_tok_s:5%.", show_default=False),
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Only rows of the machine of this name.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Only rows scored on the tokens of this digest.")] = None,
    measurement_version: Annotated[int | None, typer.Option(help="Only rows measured in this way.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also what is the same or undecided.")] = False,
    format: Annotated[str, typer.Option("--format", "-f", help="terminal or json.")] = "terminal",
) -> None:
    """Compare two sets of rows, metric by metric: better, worse, same or undecided."""
    from workbench.report.verdicts import compare as wing

    if format not in ("terminal", "json"):
        raise unknown("format", format, ["terminal", "json"])
    limits = dict(wing.parse_limit(each) for each in fail or [])
    places = [spec if "://" in spec or Path(spec).exists() else None for spec in (old, new)]
    known = [] if all(places) else _stored([results], everything=True)
    if not all(places) and not known:
        raise UserError(f"{results}: nothing measured yet, so no date or commit to choose")
    sets = [
        _stored([place], everything=True) if place else wing.select(known, spec)
        for place, spec in zip(places, (old, new), strict=True)
    ]
    found = wing.compare(
        sets[0],
        sets[1],
        thresholds=limits,
        machine=machine,
        evaluation=evaluation,
        measurement_version=measurement_version,
        recipe=recipe,
    )
    sys.stdout.write(wing.json_text(found) if format == "json" else wing.text(found, everything))
    for line in wing.doubts(found, limits):
        print(f"undecided, measure more: {line}", file=sys.stderr)
    broken = wing.failures(found, limits)
    for line in broken:
        print(f"fail: {line}", file=sys.stderr)
    raise typer.Exit(1 if broken else 0)


@app.command()
def recommend(
    rows: SomeRows = None,
    results: Results = RESULTS,
    memory: Annotated[str | None, typer.Option(help="At most this much, as 8GiB.", show_default=False)] = None,
    max_size: Annotated[str | None, typer.Option(help="At most this much on disk.", show_default=False)] = None,
    max_perplexity: Annotated[
        str | None, typer.Option(help="1% (more than the base's) or the value itself.", show_default=False)
    ] = None,
    max_kld: Annotated[float | None, typer.Option(help="Mean divergence, nats a token.", show_default=False)] = None,
    min_decode: Annotated[float | None, typer.Option(help="New tokens a second.", show_default=False)] = None,
    min_prefill: Annotated[float | None, typer.Option(help="Prompt tokens a second.", show_default=False)] = None,
    backend: Annotated[str | None, typer.Option("--backend", "-b", help="Only this engine.")] = None,
    sort: Annotated[str, typer.Option(help="speed, quality, memory or size.")] = "speed",
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    machine: Annotated[str | None, typer.Option(help="Only rows of the machine of this name.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="terminal or json.")] = "terminal",
) -> None:
    """Choose a variant and an engine under limits; exit with 1 if nothing fits."""
    from workbench.home import home, local
    from workbench.report.table import build
    from workbench.report.verdicts import recommend as wing
    from workbench.sizes import parse_size
    from workbench.worker.backends import serving_command

    if format not in ("terminal", "json"):
        raise unknown("format", format, ["terminal", "json"])
    relative, value = wing.parse_share(max_perplexity, "--max-perplexity") if max_perplexity else (None, None)
    wishes = wing.Wishes(
        memory_bytes=parse_size(memory, "--memory") if memory else None,
        size_bytes=parse_size(max_size, "--max-size") if max_size else None,
        max_perplexity=relative,
        max_perplexity_value=value,
        max_kld=max_kld,
        min_decode_tok_s=min_decode,
        min_prefill_tok_s=min_prefill,
        backend=backend,
        sort=sort,
    )
    table = build(_stored(rows or [results]), machine=machine, recipe=recipe)
    found = wing.recommend(table, wishes, lambda row: serving_command(row, str(home())))
    sys.stdout.write(wing.json_text(found) if format == "json" else wing.text(found))
    if found.choice:
        row = found.choice.line.row
        if not local(row.artifact.path).exists():
            print(f"its files are not here: `workbench quantize` of recipe '{row.recipe}' makes them", file=sys.stderr)
    raise typer.Exit(0 if found.choice else 1)


@app.command()
def plan(
    recipe: RecipeFile,
    memory: Annotated[str | None, typer.Option(help="Fit into this much, as 24GiB; default: this machine's.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence, prompt and new ones.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: what is here.", show_default=False)] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="terminal or json.")] = "terminal",
) -> None:
    """What each variant will need in each engine, and what fits, before anything is made; exit 1 if nothing fits."""
    from workbench.plan import formats
    from workbench.plan import make as wing
    from workbench.recipe.load import load
    from workbench.sizes import parse_size

    if format not in formats.FORMATS:
        raise unknown("format", format, formats.FORMATS)
    if device not in (None, "cpu", "cuda"):
        raise unknown("device", device, ["cpu", "cuda"])
    made = wing.make(
        load(recipe),
        memory_bytes=parse_size(memory, "--memory") if memory else None,
        context=context,
        batch=batch,
        cuda=None if device is None else device == "cuda",
    )
    sys.stdout.write(formats.FORMATS[format](made))
    raise typer.Exit(0 if any(need.fits for need in made.needs) else 1)


@app.command()
def report(
    rows: SomeRows = None,
    results: Results = RESULTS,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(help="A folder for each plot as SVG (and PNG, with resvg-py).", show_default=False)
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    machine: Annotated[str | None, typer.Option(help="Only rows of the machine of this name.")] = None,
) -> None:
    """Write one self-contained HTML page with the table, the plots and where the numbers come from."""
    from workbench.report.site.page import page
    from workbench.report.site.plots import plots as plots_of
    from workbench.report.site.svg import png, standalone
    from workbench.report.table import build
    from workbench.report.verdicts.steps import series_like, series_of, steps_of

    places = rows or [results]
    table = build(_stored(places), machine=machine, recipe=recipe)
    series = series_like(table, series_of(_stored(places, everything=True, quiet=True)))
    steps = [step for one in series for step in steps_of(one)]
    _write(output, page(table, series, steps))
    print(output)
    if plots is None:
        return
    for plot in plots_of(table, series, steps):
        svg = standalone(plot.wide)
        _write(plots / f"{plot.name}.svg", svg)
        picture = png(svg)
        if picture is not None:
            _write(plots / f"{plot.name}.png", picture)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the site.")],
    results: Results = RESULTS,
    url: Annotated[str, typer.Option(help="Where it will be served, for the feed.", show_default=False)] = "",
) -> None:
    """Write a static site: latest tables, history, regressions, a feed and a badge."""
    from workbench.report.site import publish as wing
    from workbench.report.site.publish import path_of

    still = wing.publish(_stored([results], everything=True), folder, url)
    print(folder / "index.html")
    for step in still:
        where = path_of(step.series.machine, step.series.recipe)
        print(f"{step.series.label}: {step.metric} {step.relative:+.1%} since {step.first.at[:10]} ({where})")


@app.command()
def nightly(
    recipes: Annotated[list[Path], typer.Argument(help="The recipes of the night.", show_default=False)],
    results: Results = RESULTS,
    site: Annotated[Path | None, typer.Option(help="Publish the site there.", show_default=False)] = None,
    url: Annotated[str, typer.Option(help="Where the site is served, for its feed.", show_default=False)] = "",
    issue: Annotated[bool, typer.Option("--issue", help="Open an issue (with gh) if something got worse.")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="Only take the last night's numbers as normal.")] = False,
    backend: Backends = None,
    quiet: Quiet = False,
) -> None:
    """Measure recipes anew and compare with the good nights before; exit with 1 if something got worse."""
    from workbench import nightly as wing
    from workbench.console import Console
    from workbench.recipe.load import load

    loaded = [load(recipe) for recipe in recipes]
    if accept:
        for recipe in loaded:
            print(f"{recipe.name}: the night of {wing.accept(recipe, results)} is the new normal")
        return
    nights = wing.run(loaded, results, Console(quiet), site=site, url=url, issue=issue, backends=backend)
    for night in nights:
        sys.stdout.write(night.text)
    raise typer.Exit(1 if any(night.verdict.alarms or night.failures for night in nights) else 0)


Author = Annotated[str, typer.Option(help="Whom the card names as `quantized_by`.", show_default=False)]
Licence = Annotated[
    str | None, typer.Option("--licence", "--license", help="The base's, as llama3.1.", show_default=False)
]


@app.command()
def card(
    variant: Annotated[str, typer.Argument(help="A variant that was made, as gguf-Q4_K_M.", show_default=False)],
    results: Results = RESULTS,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    licence: Licence = None,
    author: Author = "",
    output: Output = None,
) -> None:
    """Write a variant's model card: front matter for the hub, the measured table, provenance, licence."""
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = _stored([results])
    row = cards.find(rows, variant, recipe)
    _write(output, cards.card(rows, row, licence or wing.licence_of(row, rows), author))


@app.command()
def push(
    variant: Annotated[str, typer.Argument(help="A variant that was made, as gguf-Q4_K_M.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    results: Results = RESULTS,
    recipe: Annotated[str | None, typer.Option(help="Only rows of the recipe of this name.")] = None,
    licence: Licence = None,
    author: Author = "",
    private: Annotated[bool, typer.Option("--private", help="A repository made now is private.")] = False,
    anyway: Annotated[bool, typer.Option("--anyway", help="Though the licence forbids it or is not known.")] = False,
) -> None:
    """Upload a variant with its card to the hub, if the base's licence permits it."""
    from workbench.hub import card as cards
    from workbench.hub import push as wing

    rows = _stored([results])
    row = cards.find(rows, variant, recipe)
    print(wing.push(rows, row, repository, licence=licence, author=author, private=private, anyway=anyway))


@app.command()
def doctor() -> None:
    """Which engines are found, where, in which versions, and what each can load."""
    from workbench.doctor import report

    raise typer.Exit(report())


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    import json

    from workbench.recipe.json_schema import schema as make_schema

    print(json.dumps(make_schema(), indent=2))


@app.command()
def clean(
    everything: Annotated[bool, typer.Option("--all", help="Finished artifacts too, not only leftovers.")] = False,
) -> None:
    """Remove unfinished work, logs and (with --all) every artifact from the cache."""
    from workbench.home import clean as sweep

    freed = sweep(everything)
    print(f"{freed / 2**20:.1f} MiB freed")


def _recipe(given: Path | None) -> Path:
    from workbench.home import last_recipe

    if given is not None:
        return given
    last = last_recipe()
    if last is None:
        raise UserError("no recipe was quantized here yet: run `workbench quantize RECIPE`, or name a recipe")
    if not last.exists():
        raise UserError(f"{last}: the recipe last quantized here is gone; name a recipe")
    return last


def _named(recipe: object, names: list[str] | None) -> set[str] | None:
    from workbench.recipe.load import Recipe

    assert isinstance(recipe, Recipe)
    return recipe.matching(names) if names else None


def _stored(places: Sequence[str], everything: bool = False, quiet: bool = False) -> list[Row]:
    """Stored rows (`everything`: with the measurements that later ones superseded), the bad lines told."""
    from workbench.report import store

    found, warnings = (store.history if everything else store.read)(*places)
    for warning in [] if quiet else warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return found


def _write(output: Path | None, content: str | bytes) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(data)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}). Name another --output") from None


def _renderer(format: str, output: Path | None = None):  # type: ignore[no-untyped-def]
    """A function that prints a table, or the table of rows; an unknown format is refused before any work."""
    from workbench.report.table import Table, build

    if format not in FORMATS:
        raise unknown("format", format, FORMATS)

    def render(what: object) -> None:
        built = what if isinstance(what, Table) else build(what)  # type: ignore[arg-type]
        if output is None:
            sys.stdout.write(FORMATS[format](built))
        else:
            _write(output, FORMATS[format](built))

    return render


def main() -> None:
    """The console script: a `UserError` is one line and exit code 2, an interrupt 130."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        # typer ends an interrupted command with this code and without a word.
        if stop.code == 130:
            print("\ninterrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
