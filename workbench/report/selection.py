"""Which rows belong together: of one recipe, one machine, one evaluation; the latest of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from workbench.errors import unknown
from workbench.records import Row, Workload, digest, to_json


class Pair(NamedTuple):
    """What makes two rows measurements of the same thing."""

    base: str
    variant: str
    backend: str
    how: str
    """A digest of options and workload."""

    @property
    def label(self) -> str:
        return f"{self.variant} on {self.backend}"


def pair_of(row: Row) -> Pair:
    """Base, variant, engine, and how it was run."""
    # An option at its engine's default is null, and absent from rows that are older than the option.
    options = {name: value for name, value in row.options.items() if value is not None}
    text = repr((options, row.workload))
    how = _hows.get(text) or _hows.setdefault(text, digest([options, to_json(row.workload)]))
    return Pair(row.base, row.artifact.variant, row.backend, how)


_hows: dict[str, str] = {}
"""Digests by text: nights share a few."""


def by_pair(rows: Iterable[Row]) -> dict[Pair, list[Row]]:
    """The rows of each pair, in their order."""
    found: dict[Pair, list[Row]] = {}
    for row in rows:
        found.setdefault(pair_of(row), []).append(row)
    return found


def labels_of(rows: Mapping[Pair, Row]) -> dict[Pair, str]:
    """Names of pairs, each told by a row of it; those of one variant and engine also say which options differ."""
    return {pair: f"{pair.label}{words}" for pair, words in told_apart(rows).items()}


def engine_texts(rows: Sequence[Row]) -> dict[Pair, str]:
    """Names of the engines of rows by pair; those of one variant and engine also say which options differ."""
    words = told_apart({pair_of(row): row for row in rows})
    return {pair: f"{pair.backend}{more}" for pair, more in words.items()}


def told_apart(rows: Mapping[Pair, Row]) -> dict[Pair, str]:
    """What tells pairs of one variant and engine apart, ` (kv_cache q8_0)`; nothing where there is one only."""
    alike: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in rows:
        alike.setdefault(pair[:3], []).append(pair)
    found = dict.fromkeys(rows, "")
    for group in (each for each in alike.values() if len(each) > 1):
        told = [rows[pair].options | workload_words(rows[pair].workload) for pair in group]
        names = differing(told)
        for pair, each in zip(group, told, strict=True):
            words = ", ".join(f"{name} {each[name]}" for name in names if each.get(name) is not None)
            found[pair] = f" ({words})" if words else ""
    return found


def differing(told: Sequence[Mapping[str, object]]) -> list[str]:
    """The names whose values are not the same in all, as people read them."""
    names = dict.fromkeys(name for each in told for name in each)
    return [name for name in names if len({str(each.get(name)) for each in told}) > 1]


def workload_words(workload: Workload) -> dict[str, object]:
    """The workload in a recipe's words, where a list of one is a number."""
    found = {"batch" if name == "batches" else name: value for name, value in to_json(workload).items()}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


BASE = "base"
"""The method of the unquantized model."""


def named_rows(rows: list[Row], thing: str, wanted: str, name: Callable[[Row], str]) -> list[Row]:
    kept = [row for row in rows if name(row) == wanted]
    if not kept:
        raise unknown(thing, wanted, (name(row) for row in rows if name(row)), "results")
    return kept


def of_recipe(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """A recipe's own rows, and its bases' rows from other recipes: work done once is not done again."""
    recipe, bases = own[0].recipe, {row.base for row in own}
    return [row for row in rows if row.recipe == recipe or (row.artifact.method == BASE and row.base in bases)]


def comparable_rows(rows: list[Row], lead: Row, thing: str, name: Callable[[Row], str], notes: list[str]) -> list[Row]:
    """The rows that agree with `lead` in what `name` says; the others are counted in a note."""
    others = Counter(name(row) for row in rows if name(row) != name(lead))
    if others:
        notes.append(_left_out(sum(others.values()), f"of another {thing} ({', '.join(others)})"))
    return [row for row in rows if name(row) == name(lead)]


def like_evaluation(rows: list[Row], lead: Row, notes: list[str]) -> list[Row]:
    """The rows scored on the tokens of `lead`, and those of the same bases that were to be scored on none."""
    wanted = evaluation_digest(lead)
    bases = {row.base for row in rows if wanted and evaluation_digest(row) == wanted} or {lead.base}

    def comparable(row: Row) -> bool:
        return evaluation_digest(row) == wanted if row.evaluation else row.base in bases

    if others := [row for row in rows if not comparable(row)]:
        names = dict.fromkeys(
            f"{row.evaluation.name} {row.evaluation.digest}" if row.evaluation else row.base for row in others
        )
        notes.append(_left_out(len(others), f"of another evaluation or base ({', '.join(names)})"))
    return [row for row in rows if comparable(row)]


def evaluation_digest(row: Row) -> str:
    return row.evaluation.digest if row.evaluation else ""


def latest_of_each_pair(rows: list[Row], notes: list[str]) -> list[Row]:
    pairs: dict[Pair, Row] = {}
    measured: dict[Pair, Row] = {}
    for row in rows:
        pair = pair_of(row)
        for newest in (pairs, measured) if row.measurement else (pairs,):
            if pair not in newest or row.started_at >= newest[pair].started_at:
                newest[pair] = row
    for pair, row in pairs.items():
        good = measured.get(pair)
        if row.error and good and good.artifact.digest == row.artifact.digest:
            pairs[pair] = good
            notes.append(
                f"{row.artifact.variant} on {row.backend} was tried again and failed ({row.error}): what was measured "
                "before is shown"
            )
    if len(pairs) < len(rows):
        notes.append(_left_out(len(rows) - len(pairs), "superseded by a later one of the same variant and backend"))
    return list(pairs.values())


def _left_out(count: int, why: str) -> str:
    return f"{count} row{'s' if count > 1 else ''} not shown: {why}"


def in_order(rows: list[Row]) -> list[Row]:
    """Bases first, then variants and backends as their recipe has them, whatever order they were measured in."""
    recipes = _places(row.recipe for row in rows)
    rows = sorted(rows, key=lambda row: (recipes[row.recipe], row.place))
    bases = _places(row.base for row in rows)
    variants = _places(row.artifact.variant for row in rows)
    backends = _places(row.backend for row in rows)

    def place(row: Row) -> tuple[int, bool, int, int]:
        artifact = row.artifact
        return bases[row.base], artifact.method != BASE, variants[artifact.variant], backends[row.backend]

    return sorted(rows, key=place)


def _places(names: Iterable[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(dict.fromkeys(names))}
