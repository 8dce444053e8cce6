"""What a machine does of a step, without a cluster around it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from workbench import __version__, shared
from workbench.cluster import node
from workbench.cluster.node import Answer, Request
from workbench.errors import UserError
from workbench.home import OWN_GPUS
from workbench.records import from_json, to_json


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step sets variables of its process, which is its own elsewhere."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "node"))
    for name in (shared.STORE, OWN_GPUS):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["ray"])


def done(**parts: Any) -> Answer:
    told = json.loads(node.run(json.dumps(to_json(Request(store="", results="", **parts)))))
    answer: Answer = from_json(Answer, told)
    return answer


@pytest.mark.slow
def test_a_recipe_that_only_the_driver_has_is_read_as_it_was_sent(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = Path(Bench(tmp_path / "home", tmp_path, tiny_llama).recipe(backends={"llamacpp": {}}))
    text = recipe.read_text()
    recipe.unlink()
    answer = done(work="tokens", recipe=str(recipe), text=text)
    assert answer.error == "" and answer.made is not None
    made = node.made_of(answer.made)
    assert made.base.path == str(tiny_llama) and list(made.artifacts) == ["base"]


@pytest.mark.slow
def test_paths_are_each_machines_own(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Bench(tmp_path / "home", tmp_path, tiny_llama).recipe(backends={"llamacpp": {}})
    answer = done(work="make", recipe=recipe, text=Path(recipe).read_text(), names=["gguf-Q8_0"])
    assert answer.made is not None and str(tmp_path / "node") not in json.dumps(answer.made)
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "other"))
    (artifact,) = node.made_of(answer.made).artifacts["gguf-Q8_0"]
    assert artifact.path.startswith(str(tmp_path / "other" / "artifacts"))


def test_what_the_user_can_mend_is_an_answer(tmp_path: Path) -> None:
    answer = done(
        work="tokens", recipe=str(tmp_path / "r.yaml"), text="base: {path: nowhere}\nvariants: [{gguf: Q8_0}]\n"
    )
    assert "nowhere" in answer.error and answer.made is None


def test_another_version_of_the_program_is_refused() -> None:
    told = json.loads(node.look())
    assert told["version"] == __version__ and told["gpus"] >= 0 and told["name"]
    place = node.place_of("id", "desk", {"room": "a"}, json.dumps(told))
    assert (place.kind, place.name, place.labels) == (told["name"], "desk", {"room": "a"})
    with pytest.raises(UserError, match=r"desk: workbench 0.0.1 there, .* here.*Install one version"):
        node.place_of("id", "desk", {}, json.dumps(told | {"version": "0.0.1"}))


def test_a_step_with_gpus_says_which_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.gpus import Gpu

    monkeypatch.setattr(node, "gpus", lambda: [Gpu(1, "GPU-b", "H100", 80 << 30), Gpu(2, "GPU-c", "H100", 80 << 30)])
    done(work="tokens", recipe=str(tmp_path / "r.yaml"), text="base: {path: nowhere}\nvariants: [{gguf: Q8_0}]\n")
    assert os.environ[OWN_GPUS] == "GPU-b,GPU-c"
