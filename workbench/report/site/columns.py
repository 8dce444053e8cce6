"""The columns of a page's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workbench.report.selection import BASE
from workbench.report.site.plots import MIB
from workbench.report.table import Line, Table, workload


@dataclass(frozen=True)
class Column:
    """A column of numbers: what it shows, and its error beside it."""

    heading: str
    unit: str
    value: Callable[[Line], float | None]
    show: Callable[[float], str]
    error: Callable[[Line], str] = lambda line: ""
    help: str = ""


def columns(table: Table) -> list[Column]:
    """The columns of numbers that any line has."""

    def number(
        name: str, heading: str, unit: str, scale: float, spec: str, error: Any = None, help: str = ""
    ) -> Column:
        return Column(
            heading,
            unit,
            lambda line: line.values[name],
            lambda value: format(value / scale, spec),
            error or (lambda line: ""),
            help,
        )

    def se(name: str, spec: str, scale: float = 1.0) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            error = line.errors.get(name)
            return f"±{error / scale:{spec}}" if error is not None else ""

        return text

    def interval(which: str) -> Callable[[Line], str]:
        def text(line: Line) -> str:
            found = line.prefill_interval if which == "prefill_tok_s" else line.decode_interval
            return f"{found[0]:.1f}–{found[1]:.1f}" if found else ""

        return text

    prompt, new, batch = (
        workload(table.lines[0].row) if len({workload(line.row) for line in table.lines}) == 1 else (0, 0, 0)
    )
    point = f"{prompt} prompt tokens, {new} new ones, batch {batch}" if prompt else "see the workload"
    found = [
        number("bits_per_weight", "bpw", "bit", 1, ".2f", help="Bytes of all weight tensors x 8 over parameters"),
        number("disk_bytes", "size", "MiB", MIB, ".1f"),
        number("load_s", "load", "s", 1, ".1f"),
        number("peak_rss_bytes", "peak RSS", "MiB", MIB, ".0f", help="Of all processes of the engine, on the host"),
        number("peak_vram_bytes", "peak VRAM", "MiB", MIB, ".0f"),
        number("prefill_tok_s", "prefill", "tok/s", 1, ".1f", interval("prefill_tok_s"), f"Median of {point}; 95 %"),
        number("decode_tok_s", "decode", "tok/s", 1, ".1f", interval("decode_tok_s"), f"Median of {point}; 95 %"),
        number("ttft_s", "first token", "ms", 1e-3, ".1f", help="From submitting the prompt, median of the repeats"),
        number("itl_p95_s", "between tokens, 95 %", "ms", 1e-3, ".1f", help="95 % of the decoding steps are faster"),
        number("energy_j_per_token", "energy", "J/token", 1, ".3f", help="Of the whole machine"),
        number("bandwidth_fraction", "bandwidth", "%", 0.01, ".0f", help="Weights read, of what the machine can copy"),
        number("perplexity", "perplexity", "", 1, ".3f", se("perplexity", ".3f"), "± one standard error, by windows"),
        Column(
            "Δ perplexity",
            "",
            lambda line: line.delta.value if line.delta else None,
            lambda value: f"{value:+.3f}",
            lambda line: (
                ("~ " if line.below_noise_floor and line.row.artifact.method != BASE else "")
                + (f"±{line.delta.se:.3f}" if line.delta and line.delta.se else "")
            ).strip(),
            "To the base on the same engine, paired; ~ is below the noise floor",
        ),
        number("kld_mean", "KLD", "nat", 1, ".4f", se("kld_mean", ".4f"), "Mean divergence from the base, a token"),
        number("kld_p99", "KLD 99 %", "nat", 1, ".3f"),
        number("top1_agreement", "same top", "%", 0.01, ".2f", se("top1_agreement", ".2f", 0.01)),
    ]
    found += [_perplexity_on(name, table) for name in [*table.sets][1:]]
    found += [_task(name) for name in dict.fromkeys(name for line in table.lines for name in line.tasks)]
    return [column for column in found if any(column.value(line) is not None for line in table.lines)]


def _perplexity_on(name: str, table: Table) -> Column:
    """The perplexity on another evaluation set of the recipe."""
    lines = {line.row.key: line for line in table.sets[name].lines}

    def error(line: Line) -> str:
        se = lines[line.row.key].errors.get("perplexity")
        return f"±{se:.3f}" if se is not None else ""

    return Column(
        f"perplexity, {name}",
        "",
        lambda line: lines[line.row.key].values["perplexity"],
        lambda value: f"{value:.3f}",
        error,
        "± one standard error, by windows",
    )


def _task(name: str) -> Column:
    def error(line: Line) -> str:
        se = line.tasks[name].accuracy.se
        return f"±{100 * se:.1f}" if se is not None else ""

    return Column(
        name,
        "%",
        lambda line: line.tasks[name].accuracy.value if name in line.tasks else None,
        lambda value: f"{100 * value:.1f}",
        error,
        "Share of items answered rightly; ± one standard error",
    )
