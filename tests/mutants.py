"""Whether the tests notice a wrong number: one small change at a time in what makes or judges numbers.

    .venv/bin/python tests/mutants.py [COUNT] [SEED] [--only PART_OF_A_PATH]

Cosmic Ray makes the changes (a comparison, an operator, a sign, a number, a branch, a loop that runs not at all) in a
copy of the tree; each runs against the fast tests that belong to its module, and a change that they all pass is told
as a diff. A sample is drawn by place: a line with three comparisons counts three times, whatever each could become.
It ends with 1 if fewer than `NOTICED` were noticed.

Cosmic Ray and not mutmut, which changes only bodies of functions without decorators: thresholds are constants of their
modules.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkResult

ROOT = Path(__file__).parent.parent
NOTICED = 0.85
"""Share of the changes that the tests have to notice."""
BELONGING: dict[str, dict[str, str]] = {
    "workbench": {"sizes": "sizes"},
    "workbench/plan": {"make need tensors": "need plan texts"},
    "workbench/report": {
        "estimates": "estimates quality",
        "metrics": "metrics side_by_side verdicts/changes",
        "quality": "quality metrics",
        "selection table": "side_by_side table",
        "speeds": "speeds metrics",
        "units": "../sizes",
    },
    "workbench/report/verdicts": {
        "compare": "changes compare",
        "night": "one_night night",
        "advice limits order recommend wish": "choice recommend advice",
        "steps": "levels steps",
    },
    "workbench/worker": {"proof": "proof"},
    "workbench/worker/calibration": {
        "balance": "balance",
        "gram layout resume run walk weights windows": "pieces calibration",
    },
    "workbench/worker/measure": {
        "answers likelihoods": "../tokens/tasks",
        "bandwidth energy timing": "clocks timing",
    },
    "workbench/worker/methods": {
        "awq": "scales layers grouped awq",
        "gguf": "gguf_words gguf",
        "gptq": "layers grouped gptq ../ggml/carry",
        "grouped": "grouped ../../plan/need",
        "rounding": "rounding layers gptq",
    },
    "workbench/worker/scoring": {"head": "head", "reducer reference": "reference_file reducer"},
    "kernels/workbench_kernels/encoders": {"encode k_quants packing search small_blocks": "../../encode"},
}
"""Folder -> modules -> names of the tests that belong to them, in the folder of tests that mirrors theirs."""


def test_file(folder: str, name: str) -> str:
    """Where `name` of `BELONGING` lies: `../tokens/tasks` of workbench/worker/measure in tests/worker/tokens/."""
    place = Path("tests", folder.removeprefix("workbench").strip("/"), name)
    return os.path.normpath(place.with_name(f"test_{place.name}.py"))


TESTS = {
    f"{folder}/{module}.py": [test_file(folder, name) for name in tests.split()]
    for folder, entries in BELONGING.items()
    for modules, tests in entries.items()
    for module in modules.split()
}


def places(modules: list[str], folder: Path) -> list[list[MutationSpec]]:
    """Every place in the modules that can be changed, with all that it can become; annotations change no number."""
    with use_db(folder / "changes.sqlite") as database:
        init([Path(module) for module in modules], database, {})
        found = [item.mutations[0] for item in database.work_items]
    by_place: dict[tuple[str, tuple[int, int]], list[MutationSpec]] = {}
    for one in sorted(found, key=lambda one: (str(one.module_path), one.start_pos, one.operator_name, one.occurrence)):
        by_place.setdefault((str(one.module_path), tuple(one.start_pos)), []).append(one)
    idle = {module: without_effect(Path(module).read_text()) for module in modules}
    return [
        each
        for (module, start), each in by_place.items()
        if not any(begin <= start < end for begin, end in idle[module])
    ]


def without_effect(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(begin, end), each as (line, column), of every annotation and of the star before arguments by name."""
    nodes = [getattr(node, name, None) for node in ast.walk(ast.parse(source)) for name in ("annotation", "returns")]
    found = [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in nodes
        if isinstance(node, ast.expr)
    ]
    for number, line in enumerate(source.splitlines(), 1):
        found += [((number, star.start()), (number, star.end())) for star in re.finditer(r"\*(?=,)", line)]
    return found


def compiles(one: MutationSpec) -> bool:
    """Whether the change leaves Python: what does not is noticed by nobody's merit."""
    operator = get_operator(one.operator_name)(**one.operator_args)
    try:
        warnings.simplefilter("ignore", SyntaxWarning)
        compile(mutate_code(one.module_path.read_text(), operator, one.occurrence) or "?", "", "exec")
    except SyntaxError:
        return False
    return True


def command(module: str) -> str:
    words = f"{sys.executable} -P -m pytest -q -x -m 'not slow and not gpu' -p no:cacheprovider"
    return " ".join([words, *TESTS[module]])


def limits_s(modules: list[str]) -> dict[str, float]:
    """Seconds that the tests of each module may take: a hang is noticed too. Ends where they fail unchanged."""
    took: dict[str, float] = {}
    for words in dict.fromkeys(map(command, modules)):
        started = time.monotonic()
        if subprocess.run(words, shell=True, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"these fail without any change: {words}")
        took[words] = time.monotonic() - started
    return {module: 10 + 4 * took[command(module)] for module in modules}


def campaign(count: int, seed: int, only: str) -> int:
    modules = [module for module in TESTS if only in module]
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Path(temporary, "tree")
        files = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, copy / name)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": f"{copy}:{copy / 'kernels'}", "TMPDIR": temporary}
        chance = random.Random(seed)
        everywhere = places(modules, Path(temporary))
        chosen = []
        for place in chance.sample(everywhere, len(everywhere)):
            variants = [one for one in chance.sample(place, len(place)) if compiles(one)]
            chosen += variants[:1]
            if len(chosen) == count:
                break
        limits = limits_s(sorted({str(one.module_path) for one in chosen}))
        print(f"{len(chosen)} changes of {len(everywhere)} places in {len(modules)} modules, seed {seed}", flush=True)
        left = []
        for number, one in enumerate(sorted(chosen, key=lambda one: (str(one.module_path), one.start_pos)), 1):
            module = str(one.module_path)
            result = mutate_and_test([one], command(module), limits[module])
            if result.test_outcome != TestOutcome.KILLED:
                left.append(one)
                tell(number, one, result)
    share = 1 - len(left) / len(chosen)
    print(f"noticed {len(chosen) - len(left)} of {len(chosen)}, {share:.1%}")
    return int(share < NOTICED)


def tell(number: int, one: MutationSpec, result: WorkResult) -> None:
    changed = [line for line in (result.diff or result.output or "").splitlines() if line[:1] in "+-"]
    print(f"\n{number}. {one.module_path}:{one.start_pos[0]} {one.definition_name or ''} ({one.operator_name})")
    print("\n".join(line for line in changed if line[:3] not in ("---", "+++")), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=300)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    parser.add_argument("--only", default="", help="modules with this in their path")
    asked = parser.parse_args()
    sys.exit(campaign(asked.count, asked.seed, asked.only))
