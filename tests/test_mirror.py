"""Tests lie where the source lies that they test, and no test module imports another: what they share is a fixture or
in a module of its own. And no wall clock decides a test: this machine may be busy.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.places import ROOT

TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))
FOLDERS = sorted(
    {path.parent.relative_to(TESTS) for path in MODULES if path.stem.startswith("test_")}
    - {Path(), Path("kernels"), Path("cases")}
)


def imported(text: str) -> set[str]:
    """Last parts of the names of all modules that a file imports, and names that may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_of_tests_is_one_of_the_source(folder: Path) -> None:
    assert (ROOT / "workbench" / folder).is_dir()


def test_no_test_module_imports_another() -> None:
    names = {path.stem for path in MODULES if path.stem.startswith("test_")} | {"conftest"}
    found = {str(path.relative_to(TESTS)): imported(path.read_text()) & names for path in MODULES}
    assert {path: taken for path, taken in found.items() if taken} == {}
    assert imported("from tests.report.test_store import a_row\nimport tests.test_cli") >= {"test_store", "test_cli"}


def clocks_asserted(text: str) -> list[int]:
    """Lines of asserts that read a clock."""
    read = {"time", "monotonic", "perf_counter", "time_ns", "monotonic_ns", "perf_counter_ns"}
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Assert)
        and any(
            isinstance(inner, ast.Call) and ast.unparse(inner.func).rpartition("time.")[2] in read
            for inner in ast.walk(node)
        )
    ]


def test_no_wall_clock_decides_a_test() -> None:
    found = {path.name: clocks_asserted(path.read_text()) for path in MODULES if path.stem.startswith("test_")}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert clocks_asserted("\nassert time.monotonic() - began < 9") == [2]
