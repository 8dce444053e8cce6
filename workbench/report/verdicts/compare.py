"""Two sets of rows, metric by metric: better, worse, same, or undecided.

A difference counts only if a test on the raw samples finds it *and* it has a size that matters. Both are read off
one interval, the 95 % confidence interval of the relative change, against a threshold t:

    better / worse   the interval excludes zero, and the change is at least t
    same             the whole interval lies within (-t, t)
    undecided        anything else, and whatever has too few samples for an interval

So "same" is a finding too (an equivalence test: Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987) and
not the mere lack of one. The samples are: of speeds the repeats, by Welch's t on their logarithms, since times scatter
in proportion (with three runs or more on a side, a median each, because repeats of one process resemble each other);
of quality the windows, paired, as in `estimates.py`; of load and memory one figure a run, so that two runs on each
side are the least that can tell; sizes on disk are exact. Repeats within one process do not see what differs from
process to process: that is what the threshold is for.

Quality and size are of the files: they are compared across machines too. Speed and memory never are.

Rejected: Mann-Whitney's test on the repeats, as asv has it (three against three cannot reach 5 %), and a threshold
alone, which calls noise a regression every other night.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from workbench.errors import UserError, unknown
from workbench.records import Row
from workbench.report import estimates, quality
from workbench.report.metrics import JUDGED, METRICS, Metric
from workbench.report.selection import Pair, by_pair, evaluation_digest, labels_of
from workbench.report.store import machine_named, machine_of
from workbench.report.table import build
from workbench.report.units import amount, printable
from workbench.report.verdicts.causes import Changed, differing, grouped, known_versions, spoken

Verdict = Literal["better", "worse", "same", "undecided"]


@dataclass(frozen=True)
class Change:
    """One metric of one pair, old to new."""

    metric: str
    old: float
    new: float
    relative: float
    """Change as a share of the old value."""
    interval: tuple[float, float] | None
    """95 % interval of the relative change; None where there are too few samples for one."""
    threshold: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All pairs of two sets of rows."""

    machine: str
    changes: dict[Pair, tuple[Change, ...]]
    lost: dict[Pair, str]
    """Pairs measured in the old set that failed or cannot run in the new one, or whose logits are no longer finite,
    with the reason."""
    only_old: tuple[Pair, ...]
    only_new: tuple[Pair, ...]
    notes: tuple[str, ...] = ()
    labels: dict[Pair, str] = field(default_factory=dict)
    """What people read of each pair."""
    causes: dict[Pair, Changed] = field(default_factory=dict)
    """What else differs between the two measurements of a pair."""

    def __str__(self) -> str:
        return text(self)


def compare(
    old: Sequence[Row],
    new: Sequence[Row],
    *,
    thresholds: dict[str, float] | None = None,
    machine: str | None = None,
    evaluation: str | None = None,
    measurement_version: int | None = None,
    recipe: str | None = None,
) -> Comparison:
    """Every pair of two sets of rows. Either set may hold several runs of a pair, in any order.

    Of several machines only quality and size are compared. Raises `UserError` if a set is empty, or if together they
    hold more than one evaluation or measurement version and it was not told which.
    """
    if recipe is not None:
        known = {row.recipe for row in (*old, *new)}
        if recipe not in known:
            raise unknown("recipe", recipe, known, "results")
        old, new = ([row for row in rows if row.recipe == recipe] for rows in (old, new))
    version = None if measurement_version is None else str(measurement_version)
    limits = {name: judged.threshold for name, judged in JUDGED.items()} | (thresholds or {})
    notes: list[str] = []
    if machine is not None:
        wanted = machine_named((*old, *new), machine)
        old, new = ([row for row in rows if machine_of(row) == wanted] for rows in (old, new))
    machines = [*dict.fromkeys(map(machine_of, (*old, *new)))]
    if len(machines) > 1:
        limits = {name: size for name, size in limits.items() if METRICS[name].scored_on or JUDGED[name].exact}
        why = f"the rows are of {len(machines)} machines ({', '.join(machines)})"
        if of_one := sorted((thresholds or {}).keys() - limits.keys()):
            raise UserError(f"{why}, whose {', '.join(of_one)} cannot be compared: choose one with --machine")
        notes.append(f"{why}: only quality and size are compared")
    old, new = _one(old, new, "evaluation", evaluation, evaluation_digest)
    old, new = _one(old, new, "measurement version", version, lambda row: str(row.measurement_version))
    if not old or not new:
        raise UserError(f"nothing to compare: the {'first' if not old else 'second'} set holds no row")
    before, after = (by_pair(sorted(rows, key=lambda row: row.started_at)) for rows in (old, new))
    labels = labels_of({pair: rows[-1] for pair, rows in (before | after).items()})
    changes: dict[Pair, tuple[Change, ...]] = {}
    lost: dict[Pair, str] = {}
    causes: dict[Pair, Changed] = {}
    for pair in before:
        if pair not in after:
            continue
        measured_old = [row for row in before[pair] if row.measurement]
        measured_new = [row for row in after[pair] if row.measurement]
        causes[pair] = differing(known_versions(before[pair][-1]), known_versions(after[pair][-1]))
        if measured_old and not measured_new:
            last = after[pair][-1]
            lost[pair] = last.error or last.unsupported or "it was not measured"
        elif measured_old and measured_new:
            changes[pair] = tuple(changes_of(measured_old, measured_new, limits))
            if gone := quality.lost_tokens(measured_new[-1], measured_old[-1:]):
                lost[pair] = gone
            references = {quality.reference(rows[-1]) for rows in (measured_old, measured_new)} - {None}
            if len(references) > 1:
                notes.append(f"{labels[pair]}: divergences are from two references of the base and not compared")
    return Comparison(
        machine=", ".join(machines),
        changes=changes,
        lost=lost,
        only_old=tuple(pair for pair in before if pair not in after),
        only_new=tuple(pair for pair in after if pair not in before),
        notes=tuple(notes),
        labels=labels,
        causes=causes,
    )


def changes_of(old: Sequence[Row], new: Sequence[Row], thresholds: dict[str, float]) -> Iterable[Change]:
    """Each metric that both sides have, of the runs of one pair in the order of their time."""
    for name, threshold in thresholds.items():
        metric = METRICS[name]
        exact = name in JUDGED and JUDGED[name].exact
        if metric.difference:
            found = _paired(metric, old[-1], new[-1])
        elif metric.samples:
            found = _ratio(*(_pooled(metric.samples, rows) for rows in (old, new)))
        else:
            sides = [[v for row in rows if (v := metric.value(row)) is not None] for rows in (old, new)]
            if exact:
                sides = [values[-1:] for values in sides]
            found = _ratio(*sides)
        if found is None or not found[0]:
            continue
        before, after, interval = found
        relative = (after - before) / before
        verdict = _verdict(relative, (relative, relative) if exact else interval, threshold, metric.better)
        yield Change(name, before, after, relative, None if exact else interval, threshold, verdict)


def failures(comparison: Comparison, limits: dict[str, float]) -> list[str]:
    """Reasons for `--fail` to end with 1: a line for each pair that is worse by a limit or more, or that was lost."""
    lines = [
        f"{comparison.labels[pair]}: {change.metric} {change.relative:+.2%}, limit {change.threshold:.2%}"
        for pair, change in _limited(comparison, limits, "worse")
    ]
    if limits:
        lines += [f"{comparison.labels[pair]}: no longer measured: {why}" for pair, why in comparison.lost.items()]
    return lines


def doubts(comparison: Comparison, limits: dict[str, float]) -> list[str]:
    """A line for each pair that looks worse by a limit or more, but has too few samples to say so."""
    return [
        f"{comparison.labels[pair]}: {describe(change)}"
        for pair, change in _limited(comparison, limits, "undecided")
        if (change.relative > 0) == (METRICS[change.metric].better == "lower")
        and abs(change.relative) >= change.threshold
    ]


def _limited(comparison: Comparison, limits: dict[str, float], verdict: Verdict) -> Iterator[tuple[Pair, Change]]:
    for pair, changes in comparison.changes.items():
        for change in changes:
            if change.metric in limits and change.verdict == verdict:
                yield pair, change


def parse_limit(text: str) -> tuple[str, float]:
    """`decode_tok_s:5%` as (metric, 0.05). Raises `UserError` for anything else."""
    name, colon, size = text.partition(":")
    if name not in JUDGED:
        raise unknown("metric", name, JUDGED, f"--fail {text}")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", size.strip()) if colon else None
    if match is None:
        raise UserError(f"--fail {text}: write METRIC:PERCENT, such as {name}:5%")
    return name, float(match[1]) / 100


def select(rows: Sequence[Row], spec: str) -> list[Row]:
    """The rows of a date (`2026-11-20`, or longer, or `2026-11`) or of a commit (its first digits).

    Raises `UserError` with what there is if nothing matches.
    """
    dated = bool(re.fullmatch(r"\d{4}-\d\d(-\d\d(T[\d:]*Z?)?)?", spec))
    if dated:
        found = [row for row in rows if row.started_at.startswith(spec)]
    elif re.fullmatch(r"[0-9a-f]{4,40}(-dirty)?", spec):
        found = [row for row in rows if _same_commit(row.versions.get("commit", ""), spec)]
    else:
        raise UserError(f"{spec}: neither a file, nor a date such as 2026-11-20, nor a commit, nor one of two variants")
    if not found:
        what = "dates" if dated else "commits"
        known = dict.fromkeys(row.started_at[:10] if dated else row.versions.get("commit", "") for row in rows)
        last = ", ".join([name for name in known if name][-8:]) or "none"
        raise UserError(f"{spec}: no row of that {what[:-1]}. The latest {what}: {last}")
    return found


def of_variants(
    rows: Sequence[Row], old: str, new: str, machine: str | None, recipe: str | None, evaluation: str | None
) -> tuple[list[Row], list[Row]]:
    """The rows of two variants that would stand in one table, as if both were of one, so that they make pairs by engine
    and options. Raises `UserError` with the nearest name if one is no variant."""
    known = {row.artifact.variant for row in rows}
    for name in (old, new):
        if name not in known:
            raise unknown("variant", name, known, "results")
    lines = build(rows, machine, recipe, evaluation).lines

    def as_one(name: str) -> list[Row]:
        own = [line.row for line in lines if line.row.artifact.variant == name]
        return [replace(row, artifact=replace(row.artifact, variant=f"{old} -> {new}")) for row in own]

    return as_one(old), as_one(new)


def objects(comparison: Comparison) -> list[dict[str, object]]:
    """One object a change, and one a lost pair; `changed` is what else differs between the two measurements."""

    def named(pair: Pair) -> dict[str, object]:
        names = {"machine": comparison.machine, "base": pair.base, "variant": pair.variant, "backend": pair.backend}
        return {**names, "changed": comparison.causes.get(pair, {})}

    return [
        named(pair)
        | {"label": comparison.labels[pair], "metric": change.metric, "unit": METRICS[change.metric].unit}
        | vars(change)
        for pair, changes in comparison.changes.items()
        for change in changes
    ] + [
        named(pair) | {"metric": None, "verdict": "lost", "reason": reason} for pair, reason in comparison.lost.items()
    ]


def json_text(comparison: Comparison) -> str:
    """`objects` as a JSON list."""
    return json.dumps(objects(comparison), indent=2, allow_nan=False) + "\n"


def text(comparison: Comparison, everything: bool = False) -> str:
    """Lines for people: what is better or worse and what was lost, by engine under what changed with it, and the count
    of the rest (or all of it)."""
    counts = dict.fromkeys(("worse", "better", "undecided", "same"), 0)
    told: dict[Pair, list[str]] = {}
    for pair, changes in comparison.changes.items():
        for change in sorted(changes, key=lambda c: list(counts).index(c.verdict)):
            counts[change.verdict] += 1
            if everything or change.verdict in ("worse", "better"):
                told.setdefault(pair, []).append(f"  {change.verdict:9} {describe(change)}")
    for pair, reason in comparison.lost.items():
        told.setdefault(pair, []).append(f"  lost      {printable(reason)[:200]}")
    lines: list[str] = []
    for group in grouped(told, lambda pair: pair.backend):
        causes = [comparison.causes.get(pair, {}) for pair in group]
        if any(causes):
            lines.append(f"{printable(group[0].backend)}, {printable(spoken(causes))}:")
        for pair in group:
            lines += [printable(comparison.labels[pair]), *told[pair]]
    for title, pairs in (("only in the first", comparison.only_old), ("only in the second", comparison.only_new)):
        if pairs:
            lines.append(f"{title}: {', '.join(printable(comparison.labels[pair]) for pair in pairs)}")
    lines += [f"note: {printable(note)}" for note in comparison.notes]
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    head = f"{len(comparison.changes)} pairs on {printable(comparison.machine)}: {total}"
    if comparison.lost:
        head += f", {len(comparison.lost)} lost"
    return "\n".join([head, *lines]) + "\n"


def describe(change: Change) -> str:
    """`decode_tok_s 61.2 -> 55.0 tok/s, -10.1 % (95 %: -11.0 to -9.3 %)`."""
    unit = METRICS[change.metric].unit
    words = f"{change.metric} {amount(change.old, unit)} -> {amount(change.new, unit)}, {100 * change.relative:+.2f} %"
    if change.interval:
        words += f" (95 %: {100 * change.interval[0]:+.1f} to {100 * change.interval[1]:+.1f} %)"
    return words


def _one(
    old: Sequence[Row], new: Sequence[Row], thing: str, chosen: str | None, name: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """The rows of the one value of `name` that both sets share; those without any (not scored) stay."""
    known = dict.fromkeys(name(row) for row in (*old, *new))
    known.pop("", None)
    if chosen is None:
        if len(known) > 1:
            raise UserError(
                f"the rows are of {len(known)} {thing}s ({', '.join(known)}), which are not comparable: "
                f"choose one with --{thing.replace(' ', '-')}"
            )
        return list(old), list(new)
    matching = [value for value in known if value == chosen or (thing == "evaluation" and value.startswith(chosen))]
    if len(matching) != 1:
        raise unknown(thing, chosen, known, "results")
    return [r for r in old if name(r) in (matching[0], "")], [r for r in new if name(r) in (matching[0], "")]


def _pooled(samples: Callable[[Row], list[float]], rows: Sequence[Row]) -> list[float]:
    """The repeats of all runs, or of three runs or more a median each."""
    each = [found for row in rows if (found := samples(row))]
    if len(each) >= 3:
        return [statistics.median(found) for found in each]
    return [sample for found in each for sample in found]


Found = tuple[float, float, tuple[float, float] | None]
"""Old value, new value, interval of the relative change."""


def _ratio(old: Sequence[float], new: Sequence[float]) -> Found | None:
    """Medians, and Welch's interval of the ratio of geometric means."""
    if not old or not new:
        return None
    before, after = statistics.median(old), statistics.median(new)
    if len(old) < 2 or len(new) < 2 or min(*old, *new) <= 0:
        return before, after, None
    logs = [[math.log(value) for value in side] for side in (old, new)]
    center = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    parts = [statistics.variance(side) / len(side) for side in logs]
    total = sum(parts)
    if not total:
        return before, after, (math.expm1(center), math.expm1(center))
    # Welch & Satterthwaite's degrees of freedom, rounded down so that the interval is not too narrow.
    degrees = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, logs, strict=True))
    half = estimates.t_quantile(0.975, max(1, math.floor(degrees))) * math.sqrt(total)
    if abs(center) + half > 300:
        return before, after, None
    return before, after, (math.expm1(center - half), math.expm1(center + half))


def _paired(metric: Metric, old: Row, new: Row) -> Found | None:
    """The values of two rows, and Student's interval of their difference over windows."""
    before = metric.value(old)
    difference = metric.difference(new, old) if metric.difference else None
    if not before or difference is None:
        return None
    interval = estimates.interval(difference)
    return before, before + difference.value, (interval[0] / before, interval[1] / before) if interval else None


def _verdict(relative: float, interval: tuple[float, float] | None, threshold: float, better: str) -> Verdict:
    if interval is None:
        return "undecided"
    low, high = interval
    if (low > 0 or high < 0) and abs(relative) >= threshold:
        return "better" if (relative > 0) == (better == "higher") else "worse"
    return "same" if -threshold < low and high < threshold else "undecided"


def _same_commit(commit: str, spec: str) -> bool:
    return bool(commit) and (commit.startswith(spec) or spec.startswith(commit))
