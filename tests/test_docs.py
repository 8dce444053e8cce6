"""The documentation: built without a warning, every link followed (none leaves the machine), the notebook run anew."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import workbench as wb
from tests.places import ROOT

DOCS = ROOT / "docs"


class Links(HTMLParser):
    """What a page points to, what it loads, and where it can be pointed into."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = set[str](), set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value for name, value in attrs if value}
        self.anchors |= {own[name] for name in ("id", "name") if name in own}
        if tag in ("a", "area") and "href" in own:
            self.links.add(own["href"])
        self.loads |= {own["src"]} if "src" in own else set()
        if tag == "link" and own.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.add(own["href"])


def broken(folder: Path) -> Iterator[str]:
    """Links and loads of a folder's pages that lead nowhere, or load from elsewhere."""
    pages = {path.resolve(): Links(path.read_text()) for path in folder.rglob("*.html")}
    for path, page in pages.items():
        for link in sorted(page.links | page.loads):
            split = urlsplit(link)
            if split.scheme or split.netloc:
                if link in page.loads and split.scheme != "data":
                    yield f"{path.name} loads {link}"
                continue
            target = (path.parent / unquote(split.path)).resolve() if split.path else path
            if not target.exists():
                yield f"{path.name} -> {link}"
            elif split.fragment and target in pages and unquote(split.fragment) not in pages[target].anchors:
                yield f"{path.name} -> {link}: no such place"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(schema: Any) -> Iterator[str]:
    """Every key that a recipe may hold."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for inner in schema.values():
            yield from keys(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from keys(inner)


def test_every_key_of_a_recipe_is_explained(generate: ModuleType) -> None:
    lines = [*generate.recipe(generate.schema())]
    explained = {line.split("`")[1] for line in lines if re.match(r"\| `\w+` \| .+ \| .+ \|$", line)}
    methods = {line[3:] for line in lines if line.startswith("## ")}
    assert {*keys(generate.schema())} <= explained | methods
    assert [line for line in lines if line.startswith("| `") and line.rstrip("| ").endswith("|")] == []
    assert (
        "| `window` | whole number, from 8 to 1048576 | `512` | Tokens of a window, at most the model's context. |"
        in lines
    )


def test_every_command_has_its_help(generate: ModuleType) -> None:
    from workbench.cli import CACHE_COMMANDS, COMMANDS

    text = "\n".join(generate.commands())
    for command in COMMANDS:
        assert f"\n## {command.__name__}\n" in text and f"Usage: workbench {command.__name__} " in text
    assert all(f"\n## cache {command.__name__}\n" in text for command in CACHE_COMMANDS)
    assert "--max-perplexity" in text and "-h, --help" in text


def test_links_between_the_repositorys_texts_lead_somewhere() -> None:
    for text in (*ROOT.glob("*.md"), *DOCS.glob("*.md")):
        for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", text.read_text()):
            if "://" not in link and not link.startswith("_generated/"):
                assert (text.parent / link).exists(), f"{text.name}: {link}"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">1</a><a href="b.html#there">2</a><a href="c.html">3</a><img src="https://x/y.png">'
    )
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://x/">fine</a>')
    found = sorted(broken(tmp_path))
    assert found == ["a.html -> b.html#there: no such place", "a.html -> c.html", "a.html loads https://x/y.png"]


@pytest.mark.slow
def test_the_pages_are_built_without_a_warning_and_no_link_is_broken(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert answer.returncode == 0, answer.stderr
    pages = {path.name for path in tmp_path.glob("*.html")}
    assert {f"{page.stem}.html" for page in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb"))} <= pages
    assert list(broken(tmp_path)) == []
    assert "| variant" not in (tmp_path / "notebook.html").read_text(), "a table is a table"
    python = Links((tmp_path / "python.html").read_text()).anchors
    assert {f"workbench.{name}" for name in wb.__all__ if not name.startswith("_")} <= python


@pytest.mark.slow
def test_the_notebook_runs(real_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a fresh results folder, with the engines; and what it shows has the shape that it has in the repository."""
    import nbformat
    from nbclient import NotebookClient

    for name, value in (("WORKBENCH_HOME", real_home), ("TMPDIR", tmp_path), ("PYTHONPATH", ROOT)):
        monkeypatch.setenv(name, str(value))
    stored = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    fresh = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    NotebookClient(fresh, timeout=900, resources={"metadata": {"path": str(DOCS)}}).execute()

    def shown(notebook: Any) -> list[list[str]]:
        kinds = [[str(output.output_type) for output in cell.get("outputs", [])] for cell in notebook.cells]
        return [[kind for kind in each if kind != "stream"] or each[:1] for each in kinds]

    assert shown(fresh) == shown(stored)
    text = (DOCS / "notebook.ipynb").read_text()
    assert not re.search(r"/(tmp|root|work)/", text) and os.path.expanduser("~/") not in text
