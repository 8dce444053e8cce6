"""A recommendation in words, for a terminal of 80 columns: the wish, the choice with its figures, the runner-up and why
it is second, what to do next, and what else there is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from workbench.report import estimates, forms
from workbench.report.selection import BASE
from workbench.report.speeds import Rate
from workbench.report.units import printable
from workbench.report.verdicts.limits import Candidate, Cure, Doubt, divergence, memory_bytes, untold
from workbench.report.verdicts.wish import Constraints
from workbench.sizes import size_text

WIDTH = 80
MOST = 8
"""Lines of the front that are shown."""
CURES = {
    "again": "workbench run RECIPE --again -v {variant} -b {backend}",
    "windows": "more `windows` under `evaluation` in the recipe, then: workbench run RECIPE",
    "items": "more items in the task's file, then: workbench run RECIPE",
}
"""What decides an undecided limit."""
REASONS = {
    "speed": "it is slower, or its speed is less sure",
    "quality": "its quality is worse, or less sure",
    "memory": "it needs more memory",
    "size": "it is larger on disk",
    "": "good as the choice: nothing that was asked for tells them apart",
}
"""Why a runner-up is second, by `Recommendation.why`."""
CONDITIONS = ("the machine ", "the processor", "the GPU")
"""How warnings of a row begin that are of its speeds (`machine/monitor.py`)."""


@dataclass(frozen=True)
class Recommendation:
    """What fits, what is chosen, and why the others are not."""

    constraints: Constraints
    choice: Candidate | None
    command: str | None
    """What serves the choice as it was measured; None where its engine has no server for it."""
    front: tuple[Candidate, ...]
    """What nothing dominates of all that was measured, limits or not, by `sort`."""
    fitting: tuple[Candidate, ...]
    """What fails no limit, by `sort`."""
    rejected: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Every limit that a candidate fails, by its name."""
    tied: tuple[str, ...] = ()
    """Names of candidates that are alike with the choice in what was asked for."""
    runner_up: Candidate | None = None
    """The choice if the first were not there."""
    why: str = ""
    """Which of speed, quality, memory and size told the runner-up from the choice; `limits`: it is not known to keep
    them; empty: nothing did."""
    hope: Candidate | None = None
    """What would be chosen if every undecided limit turned out to be kept, where that is another."""

    def __str__(self) -> str:
        return _text(self)


def _text(found: Recommendation) -> str:
    lines = _wrapped("Wish: ", str(found.constraints))
    if found.choice is None:
        lines += ["", "Nothing fits. What each fails on:", *_rejected(found)]
        return "\n".join(lines) + "\n"
    lines += ["", f"Choice: {printable(found.choice.name)}", *_figures(found.choice)]
    for doubt in found.choice.doubts:
        lines += _wrapped("  undecided   ", doubt.words)
    for note in found.choice.notes:
        lines += _wrapped("  note        ", printable(note)[:300])
    if found.tied:
        lines += _wrapped(f"  as good by {found.constraints.sort}: ", printable(", ".join(found.tied)))
    if found.runner_up:
        lines += ["", f"Runner-up: {printable(found.runner_up.name)}", *_figures(found.runner_up)]
        lines += _wrapped("  second as   ", _why(found, found.runner_up))
    for one in found.fitting:
        if one is not found.choice and (why := untold(one.line)):
            lines += ["", *_wrapped("", printable(f"{one.name}: {why}"))]
    lines += _next(found)
    if found.command:
        row = found.choice.line.row
        room = max(row.workload.longest, row.longest_window)
        lines += ["", f"Serve it with (room for {room} tokens a sequence, as measured):", *_command(found.command)]
    else:
        row = found.choice.line.row
        url = row.options.get("url")
        lines += [
            "",
            printable(f"It is served at {url}.") if url else f"{row.backend} has no server of its own for it.",
        ]
    told = {found.choice.name, found.runner_up.name if found.runner_up else ""}
    front = [one for one in found.front if one in found.fitting and one.name not in told]
    if front:
        lines += ["", "Also fits, and nothing is better in one of quality, speed, memory, size and as", "good in all:"]
        lines += [
            each for one in front[:MOST] for each in _wrapped(f"  {printable(one.name)}: ", ", ".join(_short(one)))
        ]
        lines += [f"  and {len(front) - MOST} more, which --format json has"] if len(front) > MOST else []
    if found.rejected:
        lines += ["", "Rejected:", *_rejected(found)]
    return "\n".join(lines) + "\n"


def _figures(one: Candidate) -> list[str]:
    """A line for each of what was measured, with its 95 % interval."""
    line = one.line
    perplexity, memory, size = line.values["perplexity"], memory_bytes(line), line.values["disk_bytes"]
    sizes = [size_text(memory) if memory else "", f"{size_text(size)} on disk" if size else ""]
    parts = [
        ("weights", printable(forms.words(line.row))),
        ("speed", _rate(one.decode)),
        ("prompts", _rate(one.prefill)),
        ("served", _rate(one.served)),
        ("divergence", _divergence(one)),
        ("perplexity", "" if perplexity is None else f"{perplexity:.3f}{_change(one)}"),
        ("memory", ", ".join(filter(None, sizes))),
    ]
    parts += [
        (name[:11], f"{score.accuracy.value:.1%}{_between(score.interval, '.1%')}")
        for name, score in line.tasks.items()
    ]
    return [line for name, words in parts if words for line in _wrapped(f"  {name:12}", words)]


def _short(one: Candidate) -> list[str]:
    """The same in a few words."""
    line, memory = one.line, memory_bytes(one.line)
    kld = line.values["kld_mean"]
    return [
        *(["undecided"] if one.doubts else []),
        *([f"{one.decode.median:.1f} tok/s"] if one.decode else []),
        *([f"divergence {kld:.4f}"] if kld is not None else []),
        *(
            [f"perplexity {line.values['perplexity']:.3f}{_change(one)}"]
            if line.values["perplexity"] is not None
            else []
        ),
        *([size_text(memory)] if memory else []),
    ]


def _rate(rate: Rate | None) -> str:
    if rate is None:
        return ""
    return (
        f"{rate.median:.1f} tok/s{_between(rate.interval, '.1f') if rate.interval else ' (measured once)'}, {rate.name}"
    )


def _divergence(one: Candidate) -> str:
    found = divergence(one.line)
    if found is None:
        return ""
    ends = estimates.interval(found)
    return f"{found.value:.4f} nat{_between((max(0.0, ends[0]), ends[1]), '.4f') if ends else ''}"


def _change(one: Candidate) -> str:
    """The perplexity's change to the base, `~` where quality does not tell them apart."""
    perplexity, delta = one.line.values["perplexity"], one.line.delta
    if perplexity is None or delta is None or one.line.row.artifact.method == BASE:
        return ""
    return f" ({'~' if one.line.below_noise_floor else ''}{delta.value / (perplexity - delta.value):+.2%})"


def _between(ends: tuple[float, float], spec: str) -> str:
    return f" ({format(ends[0], spec)} to {format(ends[1], spec)})"


def _why(found: Recommendation, second: Candidate) -> str:
    if found.why == "limits":
        return "it is not known to keep: " + "; ".join(doubt.words for doubt in second.doubts)
    return REASONS[found.why]


def _next(found: Recommendation) -> list[str]:
    """What would make the advice surer."""
    lines: list[str] = []
    if found.choice and found.choice.doubts:
        lines += ["", "It is not known whether the choice keeps its limits. What decides it:"]
        lines += _cures(found.choice, found.choice.doubts)
    elif found.choice and any(each.startswith(CONDITIONS) for each in found.choice.line.row.warnings):
        lines += ["", "Its speed was measured under bad conditions (see its note). Measure again:"]
        lines += [f"  {_cure(found.choice, 'again')}"]
    if found.hope and found.hope.doubts:
        told = "; ".join(doubt.words for doubt in found.hope.doubts)
        lines += ["", *_wrapped(f"{printable(found.hope.name)} would be chosen, were it known to keep: ", told)]
        lines += _cures(found.hope, found.hope.doubts)
    return lines


def _cures(one: Candidate, doubts: Sequence[Doubt]) -> list[str]:
    return [f"  {_cure(one, cure)}" for cure in dict.fromkeys(doubt.cure for doubt in doubts)]


def _cure(one: Candidate, cure: Cure) -> str:
    return CURES[cure].format(variant=one.line.row.artifact.variant, backend=one.line.row.backend)


def _rejected(found: Recommendation) -> list[str]:
    """Candidates by what they fail on: one reason is often that of many."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, reasons in found.rejected.items():
        alike.setdefault(reasons, []).append(printable(name))
    return [
        line
        for reasons, names in alike.items()
        for line in _wrapped(f"  {', '.join(names)}: ", printable("; ".join(reasons))[:300])
    ]


def _command(command: str) -> list[str]:
    """One command over several lines, as a shell takes it: an option and its value stay together."""
    words = command.replace(" --", "\n--").split("\n")
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _wrapped(head: str, words: str) -> list[str]:
    """Words after their heading, wrapped below its indentation; a word longer than a line is not cut."""
    indent = " " * (14 if head.startswith("  ") and len(head) == 14 else 4)
    return textwrap.wrap(
        head + words,
        WIDTH,
        subsequent_indent=indent,
        drop_whitespace=True,
        break_long_words=False,
        break_on_hyphens=False,
    )
