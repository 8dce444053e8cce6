"""A static site from stored rows: the latest tables, their history, regressions, a feed and a badge.

    index.html                  machines and recipes, open regressions
    <machine>/<recipe>.html     the page of `page.py`, with plots over time; <recipe>.jsonl: its rows
    feed.json                   regressions, as JSON Feed 1.1 (jsonfeed.org)
    badge.svg, badge.json       how many regressions are open; the latter for shields.io's endpoint badge
    data.json                   the latest tables in SI units

Nothing in it depends on when or where it was made, so that publishing the same rows twice changes no file. Each file
is renamed into place when whole, the index last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from workbench.disk import remove_halves, write_whole
from workbench.errors import UserError
from workbench.records import Row, digest, to_json
from workbench.report.formats.data import objects
from workbench.report.metrics import METRICS
from workbench.report.site.page import page
from workbench.report.site.templates import fill
from workbench.report.store import machine_of
from workbench.report.table import Table, build
from workbench.report.units import amount
from workbench.report.verdicts.steps import Series, Step, series_like, series_of, steps_of

GREEN, RED, GREY = "#15803d", "#b91c1c", "#5c6675"


def publish(
    rows: Sequence[Row],
    folder: Path,
    home_url: str = "",
    command: Callable[[Row], str | None] = lambda row: None,
) -> list[Step]:
    """Write the site of `store.history`'s rows into a folder; the regressions that are open, newest first.

    `home_url` is where it will be served; the feed names its items by it. `command` says how to serve what a row is
    of. Raises `UserError` if there is no row or the folder cannot be written.
    """
    if not rows:
        raise UserError("nothing measured yet, so nothing to publish: run `workbench run RECIPE`")
    series = series_of(rows)
    steps = [step for one in series for step in steps_of(one)]
    worse = sorted((step for step in steps if step.worse), key=lambda step: step.first.at, reverse=True)
    tables = _tables(rows)
    files: dict[str, str] = {}
    for (machine, recipe), table in tables.items():
        own = [one for one in series_like(table, series) if one.recipe == recipe]
        mine = [step for step in steps if any(step.series is one for one in own)]
        name = path_of(machine, recipe)
        files[beside := name.removesuffix(".html") + ".jsonl"] = "".join(
            json.dumps(to_json(line.row), separators=(",", ":"), allow_nan=False) + "\n" for line in table.lines
        )
        files[name] = page(
            table,
            own,
            mine,
            title=f"{recipe} on {machine}",
            back="../index.html",
            others=[other for (at, of), other in tables.items() if of == recipe and at != machine],
            rows_file=beside.rpartition("/")[2],
            command=command,
        )
    still = [step for step in worse if step.open]
    files["feed.json"] = json.dumps(feed(worse, home_url), indent=1)
    files["badge.svg"] = badge(still)
    files["badge.json"] = json.dumps(
        {"schemaVersion": 1, "label": "nightly", "message": _message(still), "color": "red" if still else "green"}
    )
    files["data.json"] = json.dumps(
        [{"machine": m, "recipe": r, "rows": objects(table)} for (m, r), table in tables.items()], allow_nan=False
    )
    files["index.html"] = index(tables, series, worse)
    for place in {(folder / name).parent for name in files}:
        remove_halves(place)
    for name, content in files.items():
        _write(folder / name, content)
    return still


def path_of(machine: str, recipe: str) -> str:
    """Where the page of a machine and recipe is, relative to the site."""
    return f"{_slug(machine)}/{_slug(recipe)}.html"


def index(tables: dict[tuple[str, str], Table], series: Sequence[Series], worse: Sequence[Step]) -> str:
    """The first page: what there is, and what got worse."""
    pages = []
    for (machine, recipe), table in tables.items():
        own = [one for one in series if (one.machine, one.recipe) == (machine, recipe)]
        pages.append(
            {
                "path": path_of(machine, recipe),
                "recipe": recipe,
                "machine": machine,
                "latest": max(line.row.started_at for line in table.lines)[:10],
                "nights": len({point.at[:10] for one in own for point in one.points}),
                "pairs": len(table.lines),
                "failed": sum(bool(line.row.error) for line in table.lines),
                "open": sum(step.open and any(step.series is one for one in own) for step in worse),
            }
        )
    return fill("index.html", title="Workbench, measured nightly", pages=pages, steps=worse)


def feed(worse: Sequence[Step], home_url: str) -> dict[str, object]:
    """Regressions as JSON Feed 1.1."""
    home = home_url.rstrip("/")
    items = []
    for step in worse:
        one = step.series
        unit = METRICS[step.metric].unit
        url = f"{home}/{path_of(one.machine, one.recipe)}" if home else path_of(one.machine, one.recipe)
        items.append(
            {
                "id": digest([one.machine, one.recipe, *one.pair, step.metric, step.first.at]),
                "url": url,
                "title": f"{one.label}: {METRICS[step.metric].title} {100 * step.relative:+.1f} %",
                "content_text": (
                    f"{one.pair.base}, {one.label}, on {one.machine}: {step.metric} "
                    f"{amount(step.before, unit)} -> {amount(step.after, unit)} since {step.first.at} "
                    f"(last good {step.last.at})."
                ),
                "date_published": step.first.at,
                "tags": ["open" if step.open else "mended", step.metric, one.pair.backend],
                "_workbench": {
                    "machine": one.machine,
                    "recipe": one.recipe,
                    "variant": one.pair.variant,
                    "backend": one.pair.backend,
                    "metric": step.metric,
                    "before": step.before,
                    "after": step.after,
                    "open": step.open,
                    "commit": step.first.commit,
                    "last_good_commit": step.last.commit,
                    "changed": {name: list(pair) for name, pair in step.changed.items()},
                },
            }
        )
    whole: dict[str, object] = {"version": "https://jsonfeed.org/version/1.1", "title": "Workbench regressions"}
    if home:
        whole |= {"home_page_url": f"{home}/index.html", "feed_url": f"{home}/feed.json"}
    return whole | {"items": items}


def badge(still: Sequence[Step]) -> str:
    """A small SVG that says how many regressions are open."""
    words, colour = _message(still), RED if still else GREEN
    left, right = 52, 14 + 7 * len(words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="nightly: {words}"><title>nightly: {words}</title>'
        f'<rect width="{left}" height="20" fill="{GREY}"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="{colour}"/>'
        '<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">'
        f'<text x="{left / 2:g}" y="14">nightly</text><text x="{left + right / 2:g}" y="14">{words}</text></g></svg>\n'
    )


def _message(still: Sequence[Step]) -> str:
    return f"{len(still)} regression{'s' if len(still) > 1 else ''}" if still else "no regressions"


def _tables(rows: Sequence[Row]) -> dict[tuple[str, str], Table]:
    """The latest table of each machine and recipe."""
    by_machine: dict[str, list[Row]] = {}
    for row in rows:
        by_machine.setdefault(machine_of(row), []).append(row)
    found = {}
    for machine, own in sorted(by_machine.items()):
        # Of each job only the newest: a table would find it too, but by hashing ten thousand rows.
        newest = list({row.key: row for row in own}.values())
        for recipe in sorted({row.recipe for row in newest}):
            found[machine, recipe] = build(newest, machine=machine, recipe=recipe)
    return found


def _slug(name: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "x"
    return safe if safe == name else f"{safe[:60]}-{digest(name)[:8]}"


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Name another folder to publish to") from None
