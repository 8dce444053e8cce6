"""What llama.cpp says of its memory, on a small model of its own format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.machine import isolate
from workbench.records import Artifact, Job, Workload, from_json, to_json

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed"),
]


def child(payload: Any, progress: Any) -> dict[str, int]:
    """A worker: converts a base, loads it, and says what the engine says."""
    from workbench.worker.backends import llamacpp
    from workbench.worker.methods import gguf

    gguf.convert({"base": payload["base"], "out": payload["out"], "dtype": "float32", "name": "m"}, progress)
    return llamacpp.Engine(from_json(Job, payload["job"])).memory()


@pytest.mark.parametrize(("kind", "apart"), [("llama", True), ("llama-tied", False)])
def test_an_embedding_that_is_not_the_head_is_told_apart(tmp_path: Path, kind: str, apart: bool) -> None:
    out = str(tmp_path / "m.gguf")
    job = Job("b", Artifact("v", "m", "gguf", out, "", 1, 1), "llamacpp", {}, Workload(prompt_tokens=[8], new_tokens=4))
    base = write_sentencepiece(write_model(tmp_path / "base", kind))
    reply = isolate.call(
        "tests.worker.backends.test_llamacpp:child",
        {"base": str(base), "out": out, "job": to_json(job)},
        workdir=tmp_path / "w",
        time_limit_s=120,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    assert reply.value["embedding"] == (354 * 64 * 4 if apart else 0) < reply.value["weights"]
