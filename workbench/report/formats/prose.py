"""The sentences around a printed table: what stands above it, below it, and in its footnotes.

Whatever comes out of a recipe or an engine is text to be shown, not markup: it is escaped for the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from workbench.records import Evaluation
from workbench.report import loads
from workbench.report.doubts import quality_missing
from workbench.report.selection import BASE, Pair, labels_of, pair_of
from workbench.report.table import Table, shared_settings, workload

LONGEST_REASON = 400
"""Characters of an error or warning shown to people; CSV and JSON have all of it."""


def title_of(table: Table) -> str:
    bases = dict.fromkeys(line.row.base for line in table.lines)
    devices = dict.fromkeys(line.row.measurement.device for line in table.lines if line.row.measurement)
    where = f" ({', '.join(devices)})" if devices else ""
    return plain(f"{', '.join(bases)} on {table.machine}{where}")


def subtitle(table: Table) -> list[str]:
    texts = []
    points = {workload(line.row) for line in table.lines}
    repeats = {line.row.workload.repeats for line in table.lines}
    if len(points) == 1:
        prompt_tokens, new_tokens, batch = points.pop()
        count = f", {repeats.pop()} repeats" if len(repeats) == 1 else ""
        many, sequences = (f" b{batch}", f"{batch} sequences at once") if batch > 1 else ("", "one sequence")
        texts.append(
            f"t/s: tokens a second of {sequences}. pp{prompt_tokens}{many}: reading a prompt of {prompt_tokens}; "
            f"tg{new_tokens}{many} @ d{prompt_tokens}: writing {new_tokens} after it{count}"
        )
    for own in table.sets.values():
        if e := own.evaluation:
            windows = f"{e.windows} windows of {e.window} tokens"
            texts.append(f"perplexity: {e.name}, {windows}, {_convention(e)}, {e.scored_tokens} tokens")
    if table.tasks:
        asked = {
            name: max((line.tasks[name].accuracy.windows for line in table.lines if name in line.tasks), default=0)
            for name in table.tasks
        }
        counts = ", ".join(f"{name}, {count} items" for name, count in asked.items())
        texts.append(f"accuracy: {counts}; Δ acc: to the base, paired by item; 95 % intervals in brackets")
    texts.append("± after a speed: 95 % interval of the median; elsewhere: one standard error, by windows")
    if any(line.values["kld_mean"] is not None for line in table.lines):
        texts.append("KLD: mean divergence from the base, nats a token; same top: its likeliest token is the base's")
    rest = [line for own in table.sets.values() for line in own.lines if line.row.artifact.method != BASE]
    if any(line.below_noise_floor or any(score.below_noise_floor for score in line.tasks.values()) for line in rest):
        texts.append("~: not to be told from the base, by divergence or perplexity: engines or texts differ as much")
    return [plain(text) for text in texts]


def _convention(e: Evaluation) -> str:
    """Which positions were scored, as a recipe says it, and whose custom that is."""
    if e.score == "strided" and e.windows > 1:
        # The first window is scored whole, each later one in the tokens new to it.
        stride = (e.scored_tokens - (e.window - 1)) / (e.windows - 1)
        return f"strided by {stride:g} scored"
    customs = {"second-half": " (llama.cpp's convention)", "all": " (the papers' convention)"}
    return f"{e.score} scored{customs.get(e.score, '')}"


def remarks_of(table: Table) -> list[str]:
    texts = []
    for name, floor in [(name, floor) for name, own in table.sets.items() for floor in own.noise_floors]:
        where = "" if table.sets[name] is table.first else f" on {name}"
        texts.append(
            f"noise floor{where}: {floor.base} has perplexity {floor.low:.4f} to {floor.high:.4f} on "
            f"{', '.join(floor.backends)}: {100 * floor.relative:.3f} % apart"
        )
        if floor.divergences:
            each = [f"{backend} {format(value, '.1e') if value else 0}" for backend, value in floor.divergences]
            texts.append(f"noise floor{where}: divergence of {floor.base} from its own reference: {', '.join(each)}")
    missing = dict.fromkeys(why for line in table.lines if (why := quality_missing(line.row)))
    labels = labels_of({pair_of(line.row): line.row for line in table.lines})
    texts += [*missing, *_rates(table, labels), *_loads(table, labels), *_settings(table), *_idle(table), *table.notes]
    return [plain(text) for text in texts]


def _idle(table: Table) -> list[str]:
    """Pairs that cannot run, once a reason."""
    found: dict[tuple[str, int], list[str]] = {}
    for line in table.lines:
        if line.row.unsupported:
            found.setdefault((line.row.backend, line.footnotes[0]), []).append(line.row.artifact.variant)
    return [
        f"{backend} cannot run {', '.join(dict.fromkeys(variants))}: {short_text(table.footnotes[number - 1])}"
        for (backend, number), variants in found.items()
    ]


def footnotes_of(table: Table) -> list[str]:
    """The footnotes of the lines that are printed, in the order of their numbers."""
    count = max((number for line in table.lines if not line.row.unsupported for number in line.footnotes), default=0)
    return [short_text(text) for text in table.footnotes[:count]]


def _rates(table: Table, labels: Mapping[Pair, str]) -> list[str]:
    """A line for each row that was timed at further points (llama-bench's shorthand), and what that means."""
    texts, names = [], set()
    for line in table.lines:
        found = []
        for rate in line.further.values():
            half = max(rate.interval[1] - rate.median, rate.median - rate.interval[0]) if rate.interval else 0
            error = "" if not half else f" ±{half / rate.median:.1%}" if half < rate.median else " ±100%+"
            found.append(f"{rate.name} {rate.median:.1f}{error}")
            names.add(rate.name)
        if found:
            texts.append(f"{labels[pair_of(line.row)]}, t/s: {', '.join(found)}")
    words = {
        "pp": "ppN: reading N prompt tokens",
        "tg": "tgN @ dM: writing N tokens after M",
        " b": "bN: N sequences at once",
        "served": "served: new tokens of requests of mixed lengths, the next begins when any ends",
        "by groups": "by groups: the next begin when all of a group have ended",
    }
    meant = [meaning for word, meaning in words.items() if any(word in name for name in names)]
    return [*texts, f"there {'; '.join(meant)}"] if texts else []


def _loads(table: Table, labels: Mapping[Pair, str]) -> list[str]:
    """A line for each load that a server was put under, and what that means."""
    texts = []
    for line in table.lines:
        for own in loads.all_figures(line.row):
            failed = f", {own.failed} failed" if own.failed else ""
            good = f", goodput {own.goodput_req_s:.3g} req/s ({own.kept:.1%})" if own.goodput_req_s is not None else ""
            spreads = {"TTFT": own.ttft_s, "ITL": own.itl_s, "TPOT": own.tpot_s, "E2E": own.e2e_s}
            times = ", ".join(
                f"{name} {'/'.join(f'{1e3 * each:.4g}' for each in found)}" for name, found in spreads.items() if found
            )
            texts.append(
                f"{labels[pair_of(line.row)]}, {own.name}: {own.asked} requests{failed}, "
                f"{own.output_tok_s:.1f} t/s, {own.requests_s:.3g} req/s{good}, {times}, client {1e3 * own.late_s:.2g}"
            )
        serving = line.row.measurement.serving if line.row.measurement else None
        if serving and serving.largest_rate:
            low, high = serving.largest_rate
            rate = f"{low:.3g} to {high:.3g}" if high < 1e18 else f"at least {low:.3g}"
            limits = ", ".join(f"{name} {1e3 * most:g} ms" for name, most in serving.limits.items())
            texts.append(
                f"{labels[pair_of(line.row)]}: the largest rate at which 95 of 100 requests keep "
                f"{limits} is {rate} requests a second (95 %, {len(serving.largest_rate_trials)} trials)"
            )
    if texts:
        texts.append(
            "there TTFT: to the first token; ITL: between tokens; TPOT: per output token; E2E: to the end; ms, median, "
            "90 % and 99 %; client: how late the measuring itself was"
        )
    return texts


def _settings(table: Table) -> list[str]:
    return [
        f"{backend}: {', '.join(spoken)}"
        for backend, shared in shared_settings(table).items()
        if (spoken := [f"{name} {value}" for name, value in shared.items() if isinstance(value, str | int)])
    ]


def plain(text: str) -> str:
    """One line that a terminal can only print: no control characters, nothing that cannot be encoded."""
    one_line = " ".join(re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text).split())
    return "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in one_line)


def short_text(reason: str) -> str:
    text = plain(reason)
    if len(text) <= LONGEST_REASON:
        return text
    # A log's first words say what failed, its last ones why.
    return f"{text[: LONGEST_REASON // 2]} … {text[-LONGEST_REASON // 2 :]}"
