"""What the subcommands take, each declared once: `Annotated` types for typer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, TypeVar

from typer import Argument, CallbackParam, Option

from workbench.api import RESULTS as RESULTS
from workbench.disk import expanded
from workbench.errors import UserError
from workbench.report.formats import FILE_FORMATS, FORMATS

Place = TypeVar("Place", Path, str, str | None, list[str], Path | None, list[str] | None)


def _either(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _home(value: Place) -> Place:
    """A path, a URL, or a list of them, with `~` spelt out where a shell did not."""
    if isinstance(value, list):
        return [_home(each) for each in value]
    return value if value is None or "://" in str(value) else type(value)(expanded(value))


def words(value: str | None) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in (value or "").split(",") if word.strip()]


def _limit(param: CallbackParam, value: float | None) -> float | None:
    """A limit that something measured may keep. Raises `UserError` for one below zero, or that is no number."""
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"{param.opts[0]} {value:g}: a limit is zero or more")
    return value


RecipeFile = Annotated[Path, Argument(help="A recipe, such as recipes/smollm2-135m.yaml.", show_default=False)]
SomeRecipe = Annotated[
    Path | None,
    Argument(help="A recipe; without one, that last quantized on this machine.", show_default=False),
]
Recipes = Annotated[list[Path], Argument(help="The recipes of the night.", show_default=False)]
PriceFile = Annotated[
    Path,
    Argument(help="A YAML file of prices and traffic (see the documentation: Servers).", show_default=False),
]
CostPlot = Annotated[
    Path | None,
    Option("--plot", help="Draw the cost a month over traffic, as FILE.svg or FILE.png.", show_default=False),
]
SomeRows = Annotated[
    list[str] | None,
    Argument(help="Files, folders or URLs of rows; default: the results folder.", show_default=False, callback=_home),
]
Results = Annotated[
    str, Option("--results", help="The folder, or URL of one, that rows are stored in.", callback=_home)
]
OldRows = Annotated[
    str, Argument(metavar="A", help="A file, folder or URL of rows, a date, a commit or a variant.", callback=_home)
]
NewRows = Annotated[str, Argument(metavar="B", help="The same, for the later ones.", callback=_home)]

Endpoint = Annotated[
    str | None,
    Option(
        help="Measure this server, as http://127.0.0.1:8000/v1; with a recipe, its quality on the recipe's texts too.",
        show_default=False,
    ),
]
EndpointModel = Annotated[str | None, Option("--model", help="Its model; default: the only one.", show_default=False)]
KeyVariable = Annotated[
    str | None, Option("--api-key-env", metavar="VAR", help="The variable that holds its key.", show_default=False)
]
YesRemote = Annotated[bool, Option("--yes-remote", help="Servers may be other machines.")]
AtOnce = Annotated[
    list[int] | None,
    Option("--concurrency", help="So many requests at once; may be repeated. Default: 4 and 16.", min=1, max=4096),
]
Rates = Annotated[
    list[float] | None,
    Option("--rate", help="So many requests a second; may be repeated.", show_default=False),
]
Arrivals = Annotated[str, Option(help="poisson or constant: how requests of a rate come.")]
Slo = Annotated[
    list[str] | None,
    Option(
        help="A limit for goodput and the largest rate, as ttft:500ms, itl:50ms, tpot:40ms, e2e:5s; may be repeated.",
        show_default=False,
    ),
]
PromptTokens = Annotated[int, Option(help="Tokens of a prompt.", min=1, max=10**6)]
NewTokens = Annotated[int, Option(help="Tokens of an answer.", min=2, max=10**5)]
Requests = Annotated[int, Option(help="Requests of each load.", min=10, max=10**5)]

OnlyBackends = Annotated[
    list[str] | None,
    Option("--backend", "-b", help="Only this engine; may be given several times.", show_default=False),
]
OnlyBackend = Annotated[str | None, Option("--backend", "-b", help="Only this engine.")]
OnlyVariants = Annotated[
    list[str] | None,
    Option(
        "--variant",
        "-v",
        help="Only this variant (or 'gguf-*'), and the base to compare it with; may be repeated.",
        show_default=False,
    ),
]
OnlyRecipe = Annotated[str | None, Option(help="Only rows of the recipe of this name.")]
OnlyMachine = Annotated[str | None, Option(help="Only rows of the machine of this name.")]
OnlyEvaluation = Annotated[str | None, Option(help="Only rows scored on the tokens of this digest.")]
OnlyMeasurement = Annotated[int | None, Option(help="Only rows measured in this way.")]

On = Annotated[
    str | None,
    Option(
        help="On the machines of a Ray cluster: ray, or ray://HOST:PORT.",
        metavar="ray[://HOST:PORT]",
        show_default=False,
    ),
]
Store = Annotated[
    str | None,
    Option(
        help="A URL (s3://bucket/prefix) or folder where machines share what is made.",
        show_default=False,
        callback=_home,
    ),
]
OnMachines = Annotated[
    str | None,
    Option(
        "--machines",
        help="With --on: kinds or labels of machines, as h100,l40s; every job on one of each.",
        show_default=False,
    ),
]
Again = Annotated[bool, Option("--again", help="Measure again what is already measured.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress, only the result.")]
Output = Annotated[
    Path | None,
    Option("--output", "-o", help="Write to this file instead of printing.", show_default=False, callback=_home),
]
Copies = Annotated[
    Path | None,
    Option("--output", "-o", help="Copy the files into this folder.", show_default=False, callback=_home),
]
TableFormat = Annotated[str, Option("--format", "-f", help=f"{_either([*FORMATS, *FILE_FORMATS])}.")]
RowsFormat = Annotated[
    str | None,
    Option(
        "--format",
        "-f",
        help=f"{_either([*FORMATS, *FILE_FORMATS])}; default: what --output ends in, or terminal.",
        show_default=False,
    ),
]
Columns = Annotated[
    str,
    Option(
        help="These columns beside variant and engine, as kld_p99,points.pp2048.median: keys of --format csv.",
        show_default=False,
    ),
]
TextFormat = Annotated[str, Option("--format", "-f", help="terminal or json.")]

Limits = Annotated[
    list[str] | None,
    Option(help="Exit with 1 if this metric is worse by this much, as decode_tok_s:5%.", show_default=False),
]
Everything = Annotated[bool, Option("--all", help="Also what is the same or undecided.")]

AtMostMemory = Annotated[str | None, Option(help="At most this much, as 8GiB.", show_default=False)]
AtMostSize = Annotated[str | None, Option(help="At most this much on disk.", show_default=False)]
AtMostPerplexity = Annotated[
    str | None, Option(help="1% (more than the base's) or the value itself.", show_default=False)
]
AtMostKld = Annotated[
    list[str] | None,
    Option(help="Mean divergence, nats a token; SET:NUMBER for a further evaluation set. May be repeated."),
]
AtLeastAccuracy = Annotated[
    list[str] | None, Option(help="Share of a task's items, as 60%; TASK:60% for one of several. May be repeated.")
]
AtLeastServed = Annotated[
    float | None, Option(help="New tokens a second of requests served together.", show_default=False, callback=_limit)
]
WishedBatch = Annotated[
    int | None, Option("--batch", help="Speeds at so many sequences at once.", show_default=False, min=1)
]
WishedContext = Annotated[
    int | None, Option("--context", help="Speeds at so many tokens, prompt and answer.", show_default=False, min=1)
]
AtLeastDecode = Annotated[float | None, Option(help="New tokens a second.", show_default=False, callback=_limit)]
AtLeastPrefill = Annotated[float | None, Option(help="Prompt tokens a second.", show_default=False, callback=_limit)]
Sort = Annotated[str, Option(help="speed, quality, memory or size.")]

Memory = Annotated[str | None, Option(help="Fit into this much, as 24GiB; default: this machine's.")]
Context = Annotated[int | None, Option(help="Tokens of a sequence, prompt and new ones.")]
Batch = Annotated[int | None, Option(help="Sequences at once.")]
Layers = Annotated[
    bool, Option("--layers", help="Show instead which linear layers share an input, and what AWQ can scale.")
]
Device = Annotated[str | None, Option(help="cpu or cuda; default: what is here.", show_default=False)]

Page = Annotated[Path, Option("--output", "-o", help="The page.", callback=_home)]
Plots = Annotated[
    Path | None,
    Option(help="A folder for each plot as SVG (and PNG, with resvg-py).", show_default=False, callback=_home),
]
SiteFolder = Annotated[Path, Argument(metavar="DIR", help="The folder of the site.", callback=_home)]
SiteUrl = Annotated[str, Option(help="Where it will be served, for the feed.", show_default=False)]
NightlySite = Annotated[Path | None, Option(help="Publish the site there.", show_default=False, callback=_home)]
NightlyUrl = Annotated[str, Option(help="Where the site is served, for its feed.", show_default=False)]
Issue = Annotated[bool, Option("--issue", help="Open an issue (with gh) if something got worse.")]
Accept = Annotated[bool, Option("--accept", help="Only take the last night's numbers as normal.")]

MadeVariant = Annotated[str, Argument(help="A variant that was made, as gguf-Q4_K_M.", show_default=False)]
Repository = Annotated[str, Argument(metavar="OWNER/NAME", help="The repository on the hub.")]
Author = Annotated[str, Option(help="Whom the card names as `quantized_by`.", show_default=False)]
Licence = Annotated[str | None, Option("--licence", "--license", help="The base's, as llama3.1.", show_default=False)]
Private = Annotated[bool, Option("--private", help="A repository made now is private.")]
Anyway = Annotated[bool, Option("--anyway", help="Though the licence forbids it or is not known.")]
Finished = Annotated[bool, Option("--all", help="Finished artifacts too, not only leftovers.")]
Yes = Annotated[bool, Option("--yes", help="Do not ask.")]
MadeRecipe = Annotated[str, Argument(metavar="RECIPE", help="A recipe, or its name.", show_default=False)]
Version = Annotated[bool, Option("--version", help="Print the version and exit.")]
