"""Tests lie where the source lies that they test, and no test module imports another: what they share is a fixture or
in a module of its own.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.places import ROOT

TESTS = ROOT / "tests"
MODULES = sorted(TESTS.rglob("*.py"))
FOLDERS = sorted({path.parent.relative_to(TESTS) for path in MODULES} - {Path(), Path("kernels")})


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
