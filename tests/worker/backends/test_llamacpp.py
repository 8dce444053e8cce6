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


def lacking(payload: Any, progress: Any) -> str:
    """A worker: what the engine says to a file without one of its tensors."""
    import gguf

    from workbench.worker.backends import llamacpp
    from workbench.worker.methods import gguf as method

    method.convert({"base": payload["base"], "out": payload["out"], "dtype": "float32", "name": "m"}, progress)
    whole = gguf.GGUFReader(payload["out"])
    writer = gguf.GGUFWriter(payload["job"]["artifact"]["path"], "llama")
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in whole.tensors:
        if tensor.name != "blk.1.ffn_up.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        llamacpp.Engine(from_json(Job, payload["job"]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_a_file_that_lacks_a_tensor_is_an_error(tmp_path: Path) -> None:
    job = Job("b", Artifact("v", "m", "gguf", str(tmp_path / "cut.gguf"), "", 1, 1), "llamacpp", {}, Workload())
    reply = isolate.call(
        "tests.worker.backends.test_llamacpp:lacking",
        {
            "base": str(write_sentencepiece(write_model(tmp_path / "base", "llama"))),
            "out": str(tmp_path / "m.gguf"),
            "job": to_json(job),
        },
        workdir=tmp_path / "w",
        time_limit_s=120,
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert reply.error is None, reply.log
    assert "Error: " in reply.value, "not loaded"
