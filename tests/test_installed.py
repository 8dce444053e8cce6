"""The wheel in a fresh environment, with what it declares and nothing else: no engine, no pandas, no torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.places import ROOT

pytestmark = pytest.mark.slow


def declared(requires: list[str]) -> set[str]:
    """Names of all distributions that these requirements come to, without extras."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requires]
    while waiting:
        each = waiting.pop()
        if each.name not in found and (each.marker is None or each.marker.evaluate({"extra": ""})):
            found.add(each.name)
            waiting += map(Requirement, importlib.metadata.requires(each.name) or [])
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bin folder: a virtual environment with the wheel, and links to the installed packages that it declares."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("workbench", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / "source")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run(built, check=True, cwd=folder, capture_output=True)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (wheel,) = folder.glob("*.whl")
    own = [*pip, "--python", str(folder / "venv" / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(own, check=True, cwd=folder, capture_output=True)
    (info,) = site.glob("quant_workbench-*.dist-info")
    for name in declared(importlib.metadata.PathDistribution(info).requires or []):
        package = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "venv" / "bin"


def answer_of(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "WORKBENCH_"))}
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=alone | {"HOME": str(folder)})


def test_to_import_it_loads_no_library(fresh: Path, tmp_path: Path) -> None:
    program = (
        "import sys; old = {*sys.modules}; import workbench; new = {*sys.modules} - old\n"
        "print(workbench.__file__, len(new), sorted({name.split('.')[0] for name in new} - sys.stdlib_module_names))"
    )
    answer = answer_of([str(fresh / "python"), "-c", program], tmp_path)
    file, count, ours = answer.stdout.strip().split(" ", 2)
    assert file.startswith(str(fresh.parent)) and int(count) < 40 and ours == "['workbench']", answer


def test_results_are_read_without_an_engine(fresh: Path, tmp_path: Path) -> None:
    program = (
        f"import workbench as wb; table = wb.table({str(ROOT / 'results')!r}); print(len(table.lines))\n"
        f"print(wb.recommend({str(ROOT / 'results')!r}).choice is not None)\n"
        "try: table.to_pandas()\nexcept wb.UserError as error: print(error)"
    )
    answer = answer_of([str(fresh / "python"), "-c", program], tmp_path)
    lines, chosen, told = answer.stdout.splitlines()
    assert int(lines) > 10 and chosen == "True"
    assert told == 'pandas is not installed here. Install it with: pip install "quant-workbench[pandas]"'


@pytest.mark.parametrize("command", ["--help", "table", "recommend", "report"])
def test_the_command_is_there(fresh: Path, tmp_path: Path, command: str) -> None:
    places = [] if command.startswith("-") else ["--results", str(ROOT / "results")]
    answer = answer_of([str(fresh / "workbench"), command, *places], tmp_path)
    assert answer.returncode == 0 and answer.stdout, answer.stderr


def test_a_shape_is_planned_without_an_engine(fresh: Path, tmp_path: Path) -> None:
    recipe = str(ROOT / "recipes" / "llama8b-shape.yaml")
    answer = answer_of([str(fresh / "workbench"), "plan", recipe, "--memory", "24GiB"], tmp_path)
    assert answer.returncode == 0 and "gguf-Q4_K_M" in answer.stdout, answer


def test_a_run_without_engines_says_what_to_install(fresh: Path, tmp_path: Path) -> None:
    answer = answer_of([str(fresh / "workbench"), "run", str(ROOT / "recipes" / "tiny.yaml")], tmp_path)
    assert answer.returncode in (1, 2) and "Install it with: pip install" in answer.stderr, answer
