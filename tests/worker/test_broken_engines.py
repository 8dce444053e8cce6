"""An engine or a library that is installed and whose import fails: who imports one says so, and what to install."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench import front_matter, storage
from workbench.errors import UserError
from workbench.records import Artifact, Job, Workload, to_json
from workbench.report.formats.parquet import parquet
from workbench.worker.ggml import blocks, compensate, encode, mixed, names
from workbench.worker.measure import job
from workbench.worker.methods import gguf, gptqmodel

WORDS = "libcublas.so.13: cannot open shared object file: No such file or directory"
Break = Callable[[str, str], None]


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Break:
    """Puts a package in front whose import raises what it is told."""

    def put(name: str, error: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}({WORDS!r})\n")
        for imported in [each for each in sys.modules if each.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, imported)
        monkeypatch.syspath_prepend(tmp_path)

    return put


def nobody(*_: object) -> None:
    """Hears no progress."""


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_llama_cpp(error: str, broken: Break) -> None:
    """For a job, a GGUF file of one type and of several, and the blocks of a round trip."""
    broken("llama_cpp", error)
    artifact = Artifact("v", "base", "gguf", "v.gguf", "", 1, 1)
    asked = Job("b", artifact, "llamacpp", {}, Workload(), {})
    blocks._quantizer.cache_clear()
    for what, work in (
        ("llamacpp", lambda: job.measure(to_json(asked), nobody)),
        ("llama.cpp's quantizer", lambda: gguf.quantize({"out": "out.gguf"}, nobody)),
        ("llama.cpp's quantizer", lambda: mixed.make({}, nobody)),
        ("llama.cpp's quantizer", blocks._quantizer),
    ):
        with pytest.raises(UserError) as told:
            work()
        known = f"{what} is installed but cannot be imported: {WORDS}. Install it anew with: pip install"
        assert str(told.value).startswith(known), told.value


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_torch(error: str, broken: Break) -> None:
    """Without it the encoders do not run: refused where they are asked for, else the blocks are llama.cpp's."""
    broken("torch", error)
    assert encode.place_of("auto") is None
    words = rf"^torch \(encoder: workbench\) is installed but cannot be imported: {WORDS}\. Install it anew with: "
    with pytest.raises(UserError, match=words):
        encode.place_of("workbench")


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_libraries(error: str, broken: Break) -> None:
    """Broken is not the same as missing: what is installed already is to be installed anew."""
    for library, work in (
        ("torch", lambda: compensate.told("", "", "grams", nobody)),
        ("gptqmodel", lambda: gptqmodel.gptqmodel({}, nobody)),
        ("conversion", lambda: names.tensor_names({}, [])),
        ("pyarrow", lambda: parquet([])),
        ("huggingface_hub", lambda: front_matter.block({})),
        ("fsspec", lambda: storage.file_system("s3://bucket")),
    ):
        broken(library, error)
        with pytest.raises(UserError, match=f"is installed but cannot be imported: {WORDS}. Install it anew with: pip"):
            work()
