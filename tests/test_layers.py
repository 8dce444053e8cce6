"""The design's rules of who may import whom, read from the source; and that `--help` answers at once.

    errors <- records <- everything; a room imports from the rooms before it in `ROOMS`, never from those after it
    worker/    standard library and the light part of the house at top level; an engine only inside what needs it,
               so that a worker runs under an interpreter that has nothing but that engine
    machine/   standard library, psutil, NVML; knows no model
    report/    pure: no clock, no process, no engine, no file but in store.py, remote.py and publish.py
    kernels/   never imports the workbench

Outside `worker/`, what runs there is named as a string. Imported from it are only the registries (`METHODS`,
`BACKENDS`, and by `recipe/` the scoring conventions), by `plan/` a table of facts (the architectures), and by
`quantize/` the two forms of the base, and `identify` when it asks for a cache key.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.places import ROOT

HOUSE = ROOT / "workbench"
FILES = sorted(HOUSE.rglob("*.py"))
ENGINES = {
    "torch",
    "transformers",
    "vllm",
    "llama_cpp",
    "gguf",
    "mlx",
    "mlx_lm",
    "numpy",
    "safetensors",
    "datasets",
    "pandas",
    "scipy",
}
WORKER_LIGHT = {
    f"workbench.{name}"
    for name in ("disk", "errors", "first_calls", "front_matter", "gpus", "records", "shape", "sizes")
}
REGISTRIES = {"workbench.worker.backends", "workbench.worker.methods"}
ROOMS = (
    [
        "errors",
        "gpus",
        "sizes",
        "disk",
        "first_calls",
        "front_matter",
        "records",
        "intact",
        "storage",
        "shared",
        "home",
        "scratch",
        "shape",
        "serving",
        "worker",
        "console",
        "cache",
        "machine",
        "engines",
        "recipe",
    ],
    ["report", "hub", "plan", "quantize", "profile", "pipeline", "doctor", "cluster", "nightly", "api", "cli"],
)
"""Top-level modules and folders, the lowest first."""
FROM_WORKER = {
    # A table of facts: of which tensors a decoder consists.
    "plan": {"workbench.worker.architectures"},
    "quantize": {"workbench.worker.base.prepare", "workbench.worker.methods.base"},
    # The registry of scoring conventions.
    "recipe": {"workbench.worker.tokens.conventions"},
}
"""What a room outside `worker/` may import from it beside the registries."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(absolute module name, whether it is imported at top level) of everything a file imports.

    `from package import name` counts as `package.name` where that is a module of ours.
    """

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue  # for mypy alone; nothing is imported
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0 and child.module, f"{path}: relative import"
                for alias in child.names:
                    inner = ROOT / child.module.replace(".", "/") / alias.name
                    is_module = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                    yield (f"{child.module}.{alias.name}" if is_module else child.module), top
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, top and not inside)

    yield from walk(ast.parse(path.read_text()), True)


@cache
def foreign(path: Path, top_only: bool = False) -> set[str]:
    """What a file imports beyond the standard library: ours by full name, others by their top package."""
    found = set()
    for name, top in imports(path):
        first = name.split(".")[0]
        if first not in sys.stdlib_module_names and (top or not top_only):
            found.add(name if first == "workbench" else first)
    return found


def files_of(wing: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(HOUSE / wing)]


def name_of(path: Path) -> str:
    return str(path.relative_to(HOUSE))


def test_the_walk_sees_what_it_should(tmp_path: Path) -> None:
    """Or every test below could pass by seeing nothing."""
    (tmp_path / "x.py").write_text(
        "import os, torch.nn\nfrom workbench.worker import base\nfrom workbench.errors import UserError\n"
        "if True:\n    import numpy\nif TYPE_CHECKING:\n    import scipy\ndef f():\n    import vllm\n"
        "class C:\n    import gguf\n    def g(self):\n        import yaml\n"
    )
    assert foreign(tmp_path / "x.py", top_only=True) == {
        "torch",
        "workbench.worker.base",
        "workbench.errors",
        "numpy",
        "gguf",
    }
    assert foreign(tmp_path / "x.py") >= {"vllm", "yaml"}
    assert len(FILES) > 20


def test_errors_and_records_stand_below_everything() -> None:
    assert foreign(HOUSE / "errors.py") == set()
    for path in files_of("records"):
        # msgspec is used where it is (`records/codec.py`).
        assert all(name.startswith("workbench.records") for name in foreign(path) - {"msgspec"}), path


@pytest.mark.parametrize("path", files_of("worker"), ids=name_of)
def test_workers_are_light_at_top_level(path: Path) -> None:
    for name in foreign(path, top_only=True):
        assert name in WORKER_LIGHT or name.startswith("workbench.worker"), f"{path} imports {name} at top level"


@pytest.mark.parametrize("path", files_of("worker"), ids=name_of)
def test_workers_know_nothing_of_the_parents_side(path: Path) -> None:
    for name in foreign(path):
        ours = name.split(".")[0] == "workbench"
        light = name in WORKER_LIGHT or name.startswith(("workbench.worker", "workbench.serving"))
        assert not ours or light, f"{path} imports {name}"


def room_of(module: str) -> str:
    """The top-level module or folder that a module of ours is, or is in."""
    return [*module.split("."), "cli"][1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_import_runs_upwards(path: Path) -> None:
    order = [room for half in ROOMS for room in half]
    own = room_of("workbench." + name_of(path).removesuffix(".py").replace("/", "."))
    if own == "__init__":
        return
    for name in foreign(path):
        if name.startswith("workbench."):
            assert order.index(room_of(name)) <= order.index(own), f"{path} imports {name}"


def test_no_import_circle() -> None:
    """Not between files, whatever the rooms; imports inside functions count too."""
    graph = {
        "workbench." + name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): foreign(path)
        for path in FILES
    }
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for name in sorted(graph.get(module, set())):
                walk(name, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", sorted(set(FILES) - set(files_of("worker"))), ids=name_of)
def test_from_the_worker_wing_only_the_registries_are_imported(path: Path) -> None:
    taken = {name for name in foreign(path) if name.startswith("workbench.worker")}
    assert taken <= REGISTRIES | FROM_WORKER.get(path.parent.name, set())


@pytest.mark.parametrize("path", sorted(set(FILES) - set(files_of("worker"))), ids=name_of)
def test_no_engine_outside_the_worker_wing(path: Path) -> None:
    assert not foreign(path) & ENGINES - ({"pandas"} if path.name == "frame.py" else set())


def test_a_cache_key_asks_the_base_for_its_name_and_nothing_else() -> None:
    path = HOUSE / "quantize" / "record.py"
    taken = {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "workbench.worker.base.prepare"
        for alias in node.names
    }
    assert taken == {"identify"}
    assert "workbench.worker.base.prepare" not in foreign(path, top_only=True)


@pytest.mark.parametrize("path", files_of("machine"), ids=name_of)
def test_machine_knows_processes_and_no_models(path: Path) -> None:
    ours = {
        "workbench",
        *(
            f"workbench.{name}"
            for name in ("errors", "disk", "first_calls", "gpus", "home", "records", "scratch", "console")
        ),
    }
    allowed = ours | {"psutil", "pynvml"} | {name for name in foreign(path) if name.startswith("workbench.machine")}
    assert foreign(path) <= allowed
    assert "pynvml" not in foreign(path, top_only=True)


def test_what_a_worker_runs_on_is_standard_library() -> None:
    """isolate.py is loaded by the engine's own interpreter, which may have nothing of ours installed."""
    assert foreign(HOUSE / "machine" / "isolate.py") == {"workbench.disk", "workbench.errors", "workbench.first_calls"}
    assert foreign(HOUSE / "disk.py") | foreign(HOUSE / "sizes.py") == {"workbench.errors", "workbench.sizes"}


@pytest.mark.parametrize("path", files_of("report"), ids=name_of)
def test_report_is_pure(path: Path) -> None:
    allowed = {"workbench.errors", "workbench.records", "workbench.sizes", "rich"}
    allowed |= {"workbench.disk"} if path.name == "publish.py" else set()
    # Inside the one function that needs it.
    allowed |= {
        "estimates.py": {"mpmath"},
        # What reaches URLs.
        "remote.py": {"workbench.storage"},
        "store.py": {"workbench.storage"},
        "frame.py": {"pandas"},
        "parquet.py": {"pyarrow"},
        "svg.py": {"resvg_py"},
        "templates.py": {"jinja2"},
        # The registry alone, for what each engine calls itself.
        "words.py": {"workbench.worker.backends"},
    }.get(path.name, set())
    # What reads stored lines.
    reads = {"msgspec"} if path.name in ("border.py", "migrate.py", "store.py") else set()
    assert foreign(path, top_only=True) - reads <= {name for name in foreign(path) if name.startswith("workbench")}
    allowed |= reads
    assert all(name in allowed or name.startswith("workbench.report") for name in foreign(path))
    banned = {"time", "subprocess", "socket", "threading", "multiprocessing", "random", "ctypes", "signal"}
    if path.name not in ("store.py", "remote.py", "publish.py"):
        banned |= {"os", "pathlib", "shutil", "tempfile", "fcntl", "glob"}
    taken = {name.split(".")[0] for name, _ in imports(path)}
    assert not taken & banned
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in ("now", "utcnow", "today"), f"{path}:{node.lineno} has a clock"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"{path}:{node.lineno} touches the world"


@pytest.mark.parametrize("path", files_of("worker/backends"), ids=name_of)
def test_a_backend_holds_no_clock(path: Path) -> None:
    clocks = {"time", "perf_counter", "monotonic", "perf_counter_ns", "monotonic_ns", "process_time", "time_ns", "now"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in clocks, f"{path}:{node.lineno}"


def test_recipe_words_are_registry_keys_and_module_names() -> None:
    from workbench.worker.backends import BACKENDS
    from workbench.worker.methods import METHODS

    for registry, wing in ((BACKENDS, "backends"), (METHODS, "methods")):
        for word, module in registry.items():
            name = word.replace("-", "_")
            assert module == f"workbench.worker.{wing}.{name}"
            assert (HOUSE / "worker" / wing / f"{name}.py").exists()


def test_kernels_is_a_plain_folder_that_does_not_know_the_house() -> None:
    """With an `__init__.py` it would hide the PyPI package `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "workbench" for name in foreign(path)), path


def imported_for(*command: str) -> set[str]:
    """Modules that are imported while a command runs as a process, the interpreter's own among them."""
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
    )
    return {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if "import time:" in line}


def test_help_answers_at_once() -> None:
    """Importing is what `--help` takes its time for (benchmarks/help_time.py): hardly more than typer imports."""
    more = imported_for("-m", "workbench.cli", "--help") - imported_for("-c", "import typer")
    assert "workbench.errors" in more
    assert len(more) < 20, more


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["--version"], ["table", "--results", "/nowhere"]])
def test_nothing_heavy_is_imported_for_a_word(command: list[str]) -> None:
    imported = imported_for("-m", "workbench.cli", *command)
    assert "typer" in imported
    assert not imported & (ENGINES | {"yaml", "huggingface_hub", "psutil"})
