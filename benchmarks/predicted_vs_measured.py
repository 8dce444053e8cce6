"""What chosen types were expected to cost against what they cost: predicted and measured divergence of many GGUF files.

    python -P benchmarks/predicted_vs_measured.py OUT [--windows 24] [--only PATTERN ...] [--engines llamacpp ...]

On the default model: files whose types are chosen by prices, of many sizes, from all of llama.cpp's types and from
some, rounded to nearest and with compensated codes. Prices come from the calibration text; divergence from the base is
measured on docstrings of CPython's standard library, which nothing has looked at: of all files in llama.cpp, which
rounds inputs to 8 bits, and of some in transformers, de-quantized and in float32, the arithmetic that is predicted.
Prints a line a file, and by engine and rounding Spearman's rank correlation, the median of measured over predicted and
the range that 90 % of the files lie in. What is in OUT already is not made again. OUT/figures.json has the figures,
OUT/plot.svg shows them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import correlation, median
from typing import Any

import yaml

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from best_for_the_bytes import docstrings  # noqa: E402

import workbench as wb  # noqa: E402
from workbench.records import Row  # noqa: E402
from workbench.report.estimates import quantile  # noqa: E402
from workbench.report.metrics import METRICS  # noqa: E402
from workbench.report.site.svg import (  # noqa: E402
    Axis,
    Scale,
    draw_legend,
    marked,
    open_svg,
    shape_of_mark,
    standalone,
    text_element,
    text_width,
    x_ticks,
    y_ticks,
)

ROOT = Path(__file__).resolve().parents[1]
TYPES = {
    "all": [],
    "k": ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"],
    "legacy": ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"],
    "iq": ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS"],
}
"""What a file's types are chosen from; all where none is named."""
SIZES: Mapping[tuple[str, str], Sequence[str | float]] = {
    ("all", "nearest"): (2.9, "Q3_K_M", "Q4_K_M", 5.3, 6.2, 7.0),
    ("all", "compensated"): (2.9, "Q3_K_M", "Q4_K_M", 5.3, 6.2, 7.0),
    ("k", "nearest"): (2.9, 3.4, 4.0, "Q4_K_M", 5.5, 6.3),
    ("k", "compensated"): (2.9, 3.4, 4.0, "Q4_K_M", 5.5, 6.3),
    ("legacy", "nearest"): (4.6, 5.2, 6.0, 7.0),
    ("legacy", "compensated"): (4.6, 5.2, 6.0, 7.0),
    ("iq", "nearest"): (2.9, 3.4, 4.2),
    ("iq", "compensated"): (4.2,),
}
"""(Types, rounding) -> bits a weight, or the mixture whose bytes they are."""
EXACT = ("all-*-2.9", "all-*-Q4_K_M", "all-*-6.2", "k-*-3.4", "legacy-*-5.2")
"""Names of the files that are measured in transformers too."""


def name_of(types: str, rounding: str, size: str | float) -> str:
    return f"{types}-{rounding}-{size}"


def recipe(out: Path, only: Sequence[str], engines: Sequence[str], windows: int) -> Path:
    """Of everything that is made and measured, written into `out`."""
    default = yaml.safe_load((ROOT / "recipes" / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    (out / "docstrings.txt").write_text(docstrings(), encoding="utf-8")
    variants: list[dict[str, Any]] = []
    for (types, rounding), sizes in SIZES.items():
        for size in sizes:
            name = name_of(types, rounding, size)
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in only):
                options: dict[str, Any] = {"like" if isinstance(size, str) else "bits": size, "rounding": rounding}
                if TYPES[types]:
                    options["types"] = [*TYPES[types]]
                variants.append({"gguf": options, "name": name})
    names = [each["name"] for each in variants]
    exact = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in EXACT)]
    settings = {"transformers": {"dtype": "float32", "variants": ["base", *exact]}, "llamacpp": {}}
    whole = {
        "name": "predicted-vs-measured",
        **{key: default[key] for key in ("model", "base", "calibration")},
        "variants": variants,
        "evaluation": {
            "name": "docstrings",
            "source": {"file": "docstrings.txt"},
            "window": 512,
            "windows": windows,
            "score": "second-half",
        },
        "workload": {"prompt_tokens": 16, "new_tokens": 4, "repeats": 1},
        "backends": {engine: settings[engine] for engine in engines},
    }
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
    return path


# --- figures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A file in an engine; divergences in nats a token."""

    engine: str
    rounding: str
    name: str
    bits: float
    """A weight."""
    predicted: float
    measured: float

    @property
    def group(self) -> str:
        return f"{self.engine}, {self.rounding}"


def points_of(rows: Iterable[Row]) -> list[Point]:
    """Of all rows that have both divergences, by engine and rounding, the smallest prediction first."""
    found = []
    for row in rows:
        predicted, measured = METRICS["kld_predicted"].value(row), METRICS["kld_mean"].value(row)
        if predicted and measured:
            rounding = "compensated" if "rounding" in row.artifact.provenance else "nearest"
            bits = row.artifact.bits_per_weight or math.nan
            found.append(Point(row.backend, rounding, row.artifact.variant, bits, predicted, measured))
    return sorted(found, key=lambda point: (point.engine, point.rounding, point.predicted))


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def agreement(points: Sequence[Point]) -> dict[str, float | int | None]:
    """Of files in one engine: their number, rank correlation (of three at least), median ratio and 90 % range."""
    ratios = sorted(point.measured / point.predicted for point in points)
    orders = ranks([point.predicted for point in points]), ranks([point.measured for point in points])
    return {
        "files": len(points),
        "spearman": correlation(*orders) if len(points) > 2 else None,
        "median": median(ratios),
        "low": quantile(ratios, 0.05),
        "high": quantile(ratios, 0.95),
    }


def told(found: Mapping[str, float | int | None]) -> str:
    order = "-" if found["spearman"] is None else f"{found['spearman']:.4f}"
    return (
        f"{found['files']:3} files, rank correlation {order}, measured / predicted "
        f"{found['median']:.3f} (90 %: {found['low']:.3f} to {found['high']:.3f})"
    )


def plot(groups: Mapping[str, Sequence[Point]]) -> str:
    """Measured over predicted divergence, both logarithmic; on the line they are equal."""
    width, height, top, bottom, right = 800, 640, 52, 44, 16
    every = [point for points in groups.values() for point in points]
    values = [value for point in every for value in (point.predicted, point.measured)]
    y = Scale(values, Axis("measured", log=True), height - bottom, top)
    left = 16 + max(text_width(text) for _, text in y.ticks)
    x = Scale(values, Axis("predicted", log=True), left, width - right)
    low, high = min(values), max(values)
    out = [open_svg(width, height, "measured over predicted divergence of GGUF files")]
    out += draw_legend(list(groups), 12, 18)
    out.append(text_element(4, 40, "measured divergence, nats a token", "t"))
    out += [*y_ticks(y, left, width - right), *x_ticks(x, height - bottom, top, width)]
    words = "predicted divergence, nats a token (line: as predicted)"
    out.append(text_element((left + width - right) / 2, height - 8, words, "t", "middle"))
    out.append(f'<path class="f" d="M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"/>')
    for place, points in enumerate(groups.values()):
        for point in points:
            words = f"{point.name}: {point.predicted:.4f} predicted, {point.measured:.4f} measured"
            mark = shape_of_mark(place, x(point.predicted), y(point.measured), 4.5)
            out.append(marked(point.name, words, mark))
    return standalone("".join(out) + "</svg>")


def report(points: Sequence[Point], out: Path) -> None:
    """Print a line a file and what they agree in; write figures and plot into `out`."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    for group, some in groups.items():
        print(f"\n{group}\n{'file':26} {'bits':>6} {'predicted':>10} {'measured':>10} {'ratio':>7}")
        for each in some:
            ratio = each.measured / each.predicted
            print(f"{each.name:26} {each.bits:6.3f} {each.predicted:10.5f} {each.measured:10.5f} {ratio:7.3f}")
    figures = {group: agreement(some) for group, some in groups.items()}
    print()
    for group, found in figures.items():
        print(f"{group:26} {told(found)}")
    whole = {"agreement": figures, "files": [asdict(point) for point in points]}
    (out / "figures.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "plot.svg").write_text(plot(groups), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of files' names")
    parser.add_argument("--engines", nargs="+", default=["llamacpp", "transformers"])
    parser.add_argument("--windows", type=int, default=24)
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WORKBENCH_HOME", str(out / "cache"))
    run = wb.run(recipe(out, given.only, given.engines, given.windows), out / "rows", quiet=False)
    for name, reason in run.failures.items():
        print(f"{name}: {reason}")
    points = points_of(run.rows)
    if not points:
        sys.exit("no file has both divergences")
    report(points, out)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
