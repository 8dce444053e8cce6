"""What `recommend` answers, over stored rows and over the same rows as a busy machine would have measured them.

    python benchmarks/advice.py results/amd-epyc-2-cores-24-gib [SEED]

Half of the busy rows, drawn by the seed, have their repeats slowed and sped up by factors of up to ten, and the warning
that comes with it. Prints wish, choice, runner-up and why as a table, then the same for 300 drawn wishes in numbers.
Exit code 1 if a choice has an undecided limit while something that fits has none, or if a busy row won a speed by it.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from workbench.records import Row
from workbench.report import store
from workbench.report.table import Table, build
from workbench.report.verdicts.limits import memory_bytes
from workbench.report.verdicts.recommend import Constraints, Recommendation, recommend

BUSY = "the machine was busy: other processes took 1.4 cores on average"
WISHES = [
    Constraints(),
    Constraints(min_decode_tok_s=50),
    Constraints(min_decode_tok_s=50, sort="quality"),
    Constraints(min_decode_tok_s=100, max_kld=0.1),
    Constraints(max_perplexity=0.01),
    Constraints(max_perplexity=0.05, sort="size"),
    Constraints(size_bytes=160 * 2**20, sort="quality"),
    Constraints(size_bytes=160 * 2**20, sort="quality", backend="vllm"),
    Constraints(memory_bytes=600 * 2**20, min_decode_tok_s=80, sort="quality"),
    Constraints(max_kld=0.05, sort="memory"),
]


def busy(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows, half of those that were measured as a busy machine would have measured them."""
    chance, found = random.Random(seed), []
    for row in rows:
        if row.measurement and row.measurement.speeds and chance.random() < 0.5:
            width = chance.uniform(0.2, math.log(10))
            speeds = []
            for speed in row.measurement.speeds:
                factors = [math.exp(chance.uniform(-width, width)) for _ in speed.step_s]
                steps = [[each * factor for each in steps] for steps, factor in zip(speed.step_s, factors, strict=True)]
                first = [each * factor for each, factor in zip(speed.first_token_s, factors, strict=True)]
                speeds.append(replace(speed, step_s=steps, first_token_s=first))
            measured = replace(row.measurement, speeds=speeds)
            row = replace(row, measurement=measured, warnings=[*row.warnings, BUSY])
        found.append(row)
    return found


def wishes(table: Table, seed: int, count: int) -> Iterator[Constraints]:
    """Wishes that are near to what some row has, so that they are neither met by all nor by none."""
    chance = random.Random(seed)
    lines = [line for line in table.lines if line.row.measurement]

    def near(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value]
        return chance.choice(known) * chance.uniform(0.9, 1.15) if known and chance.random() < 0.4 else None

    for _ in range(count):
        yield Constraints(
            memory_bytes=near([memory_bytes(line) for line in lines]),
            size_bytes=near([line.values["disk_bytes"] for line in lines]),
            max_perplexity=chance.choice([None, None, None, 0.01, 0.05, 0.15]),
            max_kld=near([line.values["kld_mean"] for line in lines]),
            min_decode_tok_s=near([line.values["decode_tok_s"] for line in lines]),
            min_prefill_tok_s=near([line.values["prefill_tok_s"] for line in lines]),
            backend=chance.choice([None, None, "llamacpp", "vllm"]),
            sort=chance.choice(["speed", "quality", "memory", "size"]),
        )


def faults(found: Recommendation) -> list[str]:
    """What no advice may be."""
    if found.choice is None:
        return []
    told = []
    if found.choice.doubts and any(not one.doubts for one in found.fitting):
        told.append(f"{found.choice.name} is undecided though another holds: {found.constraints}")
    least = found.choice.decode.interval[0] if found.choice.decode and found.choice.decode.interval else 0.0
    steady = [one for one in found.fitting if one.standing == found.choice.standing and one.decode]
    if found.constraints.sort == "speed" and any(
        one.decode and one.decode.interval and one.decode.interval[0] * 0.95 > least for one in steady
    ):
        told.append(f"{found.choice.name} was chosen by its speed, of which another is surer: {found.constraints}")
    return told


def main(place: str, seed: int) -> int:
    """Print the advice; whether any of it is wrong."""
    rows, _ = store.read(place)
    wrong: list[str] = []
    print("| rows | wish | choice | runner-up | second by |\n| --- | --- | --- | --- | --- |")
    for name, given in (("published", rows), ("busy", busy(rows, seed))):
        table = build(given)
        for wish in WISHES:
            found = recommend(table, wish)
            choice = f"{found.choice.name}{' (undecided)' if found.choice.doubts else ''}" if found.choice else "none"
            second = found.runner_up.name if found.runner_up else ""
            print(f"| {name} | {wish} | {choice} | {second} | {found.why} |")
            wrong += faults(found)
    for name, given in (("published", rows), ("busy", busy(rows, seed))):
        table = build(given)
        answers = [recommend(table, wish) for wish in wishes(table, seed, 300)]
        wrong += [fault for found in answers for fault in faults(found)]
        standings = [found.choice.standing if found.choice else 3 for found in answers]
        words = ("hold", "are likely to", "may", "do not: nothing fits")
        print(
            f"{name}, 300 drawn wishes, whose limits", ", ".join(f"{words[i]} {standings.count(i)}" for i in range(4))
        )
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
