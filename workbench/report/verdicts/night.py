"""What a night's rows mean, next to the good nights before it: the decisions of `workbench nightly`, and no more.

A metric of a pair is suspect if tonight's value is worse than the level of up to seven good nights (their median) by
more than a size that matters and by more than three standard errors of such a difference. How much nights differ by
themselves is learnt from them: the spread of the pair's own nights and the median spread of all pairs, half and half
in variance, because seven points alone know their spread badly (the idea of moderated variances: Smyth, Statistical
Applications in Genetics and Molecular Biology 3, 2004). With fewer than four nights nothing is known of it: then a
speed must also fail the test on the repeats (`compare.py`).

A suspect is measured again, and only the median of three is believed: one busy minute of the machine is no
regression. A pair that was measured on a good night and cannot be measured tonight is broken, and so
is one with more NaN or infinite logits than on any of them. Good nights are those
without an alarm; of the others, the pairs that had none count too. So a regression is told every night until it is
mended or accepted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NotRequired, TypedDict

from workbench.records import Moment, Row
from workbench.report import quality
from workbench.report.metrics import JUDGED, METRICS
from workbench.report.selection import Pair, by_pair, evaluation_digest, labels_of, pair_of
from workbench.report.units import amount, printable
from workbench.report.verdicts import compare
from workbench.report.verdicts.causes import Changed, differing, grouped, known_versions, spoken

WATCHED = {name: judged.threshold for name, judged in JUDGED.items() if judged.nightly}
"""Relative change for the worse that matters on a night, by metric."""

NIGHTS = 7
"""Good nights that make the level."""
ENOUGH = 4
"""Nights from which a spread is read."""
ERRORS = 3.0
TIMES = 3
"""Measurements that a suspect gets in all."""
NIGHTS_NOTE = "nights"
"""The name of the notes (`store.append_note`) that remember nights."""


@dataclass(frozen=True)
class Alarm:
    """One thing that got worse."""

    pair: Pair
    metric: str | None
    """Metric that got worse; None: the pair could not be measured at all, or its logits are no longer finite."""
    reason: str
    """The reason in words, with the numbers."""
    label: str = ""
    """What people read of the pair."""
    changed: Changed = field(default_factory=dict)
    """What differs from the last good night."""


@dataclass(frozen=True)
class NightVerdict:
    """What is to be said of a night, as far as it has been measured."""

    alarms: tuple[Alarm, ...]
    suspects: tuple[Pair, ...]
    """Pairs to be measured again before anything is said of them."""
    compared: int
    """Pairs that had a level to be compared with."""

    @property
    def word(self) -> str:
        """`first`, `good`, `regressed` or `broken`."""
        if any(alarm.metric is None for alarm in self.alarms):
            return "broken"
        return "regressed" if self.alarms else "good" if self.compared else "first"


class NightNote(TypedDict):
    """What is remembered of a night: a line of the notes."""

    recipe: str
    since: Moment
    until: Moment
    verdict: str
    alarmed: list[tuple[str, str]]
    """Variant and backend of each alarm."""
    alarms: list[str]
    accepted: NotRequired[bool]
    """Whether somebody took the night's numbers for the new normal."""


def judge(before: Sequence[Row], tonight: Sequence[Row], notes: Sequence[NightNote] = ()) -> NightVerdict:
    """A night against the good ones before it; all rows are of one machine and one recipe's base.

    `tonight` may hold several measurements of a pair; `notes` are those of `note_of`, and say which nights were bad.
    """
    levels = good_nights(before, notes)
    now = by_pair(tonight)
    alarms: list[Alarm] = []
    suspects: list[Pair] = []
    compared = 0
    spreads = _spreads(levels)
    for pair, rows in now.items():
        measured = [row for row in rows if row.measurement]
        nights = [night for night in levels.get(pair, []) if not measured or _alike(night[-1], measured[-1])]
        if not nights:
            continue
        compared += 1
        if not measured:
            reason = rows[-1].error or rows[-1].unsupported or "it was not measured"
            alarms.append(Alarm(pair, None, reason))
            continue
        if why := quality.lost_tokens(measured[-1], (row for night in nights for row in night)):
            alarms.append(Alarm(pair, None, why))
            continue
        found = [alarm for name in WATCHED if (alarm := _worse(pair, name, nights, measured, spreads))]
        if found and len(measured) < TIMES:
            suspects.append(pair)
        else:
            alarms += found
    labels = labels_of({pair: rows[-1] for pair, rows in now.items()})
    told = tuple(
        replace(
            alarm,
            label=labels[alarm.pair],
            changed=differing(known_versions(levels[alarm.pair][-1][-1]), known_versions(now[alarm.pair][-1])),
        )
        for alarm in alarms
    )
    return NightVerdict(told, tuple(suspects), compared)


def good_nights(rows: Sequence[Row], notes: Sequence[NightNote]) -> dict[Pair, list[list[Row]]]:
    """For each pair its last good nights, oldest first, each with its measurements.

    Rows that were stored by hand, outside any night, count as a night a day.
    """
    accepted = max((note["since"] for note in notes if note.get("accepted")), default="")
    nights: dict[Pair, dict[str, list[Row]]] = {}
    for row in rows:
        if row.measurement is None or row.started_at < accepted:
            continue
        pair = pair_of(row)
        name = row.started_at[:10]
        bad = False
        for note in notes:
            if not note.get("accepted") and note["since"] <= row.started_at <= note["until"]:
                name = note["since"]
                bad = name != accepted and (pair.variant, pair.backend) in note["alarmed"]
        if not bad:
            nights.setdefault(pair, {}).setdefault(name, []).append(row)
    return {pair: [found[name] for name in sorted(found)][-NIGHTS:] for pair, found in nights.items()}


def note_of(recipe: str, since: str, until: str, verdict: NightVerdict) -> NightNote:
    """What is to be remembered of a night."""
    return {
        "recipe": recipe,
        "since": since,
        "until": until,
        "verdict": verdict.word,
        "alarmed": [(alarm.pair.variant, alarm.pair.backend) for alarm in verdict.alarms],
        "alarms": [alarm.reason for alarm in verdict.alarms],
    }


def text(verdict: NightVerdict, recipe: str, machine: str) -> str:
    """The night in lines of markdown, for a log and for an issue: by engine, under what changed since the last good
    night, and then by metric."""
    lines = [f"{recipe} on {machine}: {verdict.word}, {verdict.compared} pairs compared with the good nights before."]
    order = {name: place for place, name in enumerate([None, *WATCHED])}
    alarms = sorted(verdict.alarms, key=lambda alarm: order[alarm.metric])
    for group in grouped(alarms, lambda alarm: alarm.pair.backend):
        count = f"{len(group)} alarm{'s' if len(group) > 1 else ''}"
        cause = spoken(alarm.changed for alarm in group)
        lines += ["", f"{printable(group[0].pair.backend)}, {count}; {printable(cause)}", ""]
        for alarm in group:
            what = alarm.reason if alarm.metric else f"broken: {alarm.reason}"
            lines.append(f"- {printable(alarm.label)}: {printable(what)[:400]}")
    return "\n".join(lines) + "\n"


def _alike(one: Row, other: Row) -> bool:
    """Whether two rows of a pair may be compared at all."""
    same_evaluation = evaluation_digest(one) == evaluation_digest(other)
    return same_evaluation and one.measurement_version == other.measurement_version


def _value(name: str, rows: Sequence[Row]) -> float | None:
    """A night's value: the median of its measurements."""
    values = [value for row in rows if (value := METRICS[name].value(row)) is not None]
    return statistics.median(values) if values else None


def _worse(
    pair: Pair, name: str, nights: Sequence[Sequence[Row]], tonight: Sequence[Row], spreads: dict[str, float]
) -> Alarm | None:
    metric, new = METRICS[name], _value(name, tonight)
    if metric.scored_on == "reference":
        # Another reference of the base is another measure.
        own = quality.reference(tonight[-1])
        nights = [night for night in nights if quality.reference(night[-1]) == own]
    known = [value for night in nights if (value := _value(name, night))]
    if not new or not known:
        return None
    old = statistics.median(known)
    change = math.log(new / old) * (1 if metric.better == "lower" else -1)
    if change < math.log1p(WATCHED[name]) * 0.999:
        return None
    if len(known) >= ENOUGH:
        spread = math.sqrt((_spread(known) ** 2 + spreads.get(name, 0.0) ** 2) / 2)
        # A median's error is sqrt(pi / 2) of a mean's.
        error = spread * math.sqrt(1 / min(len(tonight), 2) + math.pi / 2 / len(known))
        if change < ERRORS * error:
            return None
    elif metric.samples:
        changes = compare.changes_of([row for night in nights for row in night], tonight, {name: WATCHED[name]})
        if any(found.verdict != "worse" for found in changes):
            return None
    words = (
        f"{name} {amount(old, metric.unit)} -> {amount(new, metric.unit)} ({100 * (new / old - 1):+.1f} %, "
        f"limit {100 * WATCHED[name]:g} %, median of {len(tonight)} against {len(known)} good nights)"
    )
    return Alarm(pair, name, words)


def _spreads(levels: dict[Pair, list[list[Row]]]) -> dict[str, float]:
    """How much nights differ by themselves: by metric, the median over pairs."""
    found: dict[str, float] = {}
    for name in WATCHED:
        each = []
        for nights in levels.values():
            values = [value for night in nights if (value := _value(name, night))]
            if len(values) >= ENOUGH:
                each.append(_spread(values))
        if each:
            found[name] = statistics.median(each)
    return found


def _spread(values: Sequence[float]) -> float:
    """A standard deviation of logarithms that one odd night does not move: 1.4826 times the median deviation."""
    logs = [math.log(value) for value in values]
    middle = statistics.median(logs)
    return 1.4826 * statistics.median(abs(log - middle) for log in logs)
