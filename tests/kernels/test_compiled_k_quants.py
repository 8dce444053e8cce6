"""The GPU's K-quants: their source compiled for a processor against llama.cpp's, to the byte; and for GPUs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from workbench_kernels.encoders import encode as dispatch  # noqa: E402
from workbench_kernels.encoders.compiled_k_quants import RUNS, SOURCE, program  # noqa: E402
from workbench_kernels.encoders.encode import encode  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES  # noqa: E402

from tests.kernels.encoder_cases import by_llama_cpp, importances, weights  # noqa: E402


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """As NVRTC is told: without fused multiply-adds."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("k_quants") / "k_quants.so"
    told = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    source = Path(__file__).with_name("k_quants_on_cpu.cpp")
    subprocess.run([compiler, *told, f"-I{SOURCE.parent}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def by_source(library: ctypes.CDLL, kind: str, weight: Any, importance: Any) -> Any:
    rows, columns = weight.shape
    out = torch.full((rows, BLOCK_TYPES[kind].row_bytes(columns)), 0xA5, dtype=torch.uint8)
    pointers = [ctypes.c_void_p(each.data_ptr()) if each is not None else None for each in (weight, importance, out)]
    library[kind.lower()](*pointers, ctypes.c_longlong(weight.numel() // 256), columns // 256)
    return out


@pytest.mark.parametrize("kind", RUNS)
def test_the_source_makes_llama_cpps_bytes(kind: str, on_cpu: ctypes.CDLL) -> None:
    size, blocks = BLOCK_TYPES[kind].layout.size_bytes, list(weights(0))
    whole = torch.cat([weight for _, weight in blocks])
    for said, importance in importances(0):
        found, wanted = by_source(on_cpu, kind, whole, importance), by_llama_cpp(kind, whole, importance)
        parts = (each.split([len(weight) for _, weight in blocks]) for each in (found, wanted))
        for (name, _), ours, theirs in zip(blocks, *parts, strict=True):
            other = (ours.reshape(-1, size) != theirs.reshape(-1, size)).any(1)
            assert not bool(other.any()), f"{name}, importances {said}: {int(other.sum())} of {other.numel()} blocks"


@pytest.mark.parametrize("kind", RUNS)
def test_the_source_makes_torchs_bytes_at_the_edge_of_float16(kind: str, on_cpu: ctypes.CDLL) -> None:
    """Larger numbers are refused; there the float16 scales are infinite by both."""
    size = BLOCK_TYPES[kind].layout.size_bytes
    start, end = dispatch.ENCODERS[kind].halves
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(3, 8, 64)[:, None]
    seen = set()
    for _, importance in importances(0):
        found = by_source(on_cpu, kind, weight, importance)
        fits = found.view(-1, size)[:, start:end].contiguous().view(torch.float16).isfinite().all(1)
        for row, fitting in enumerate(fits.view(64, 2).all(1).tolist()):
            seen.add(fitting)
            if fitting:
                assert torch.equal(encode(kind, weight[row : row + 1], importance), found[row : row + 1])
            else:
                with pytest.raises(ValueError, match="too large for the float16 scales"):
                    encode(kind, weight[row : row + 1], importance)
    assert seen == {False, True}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", RUNS)
def test_it_compiles_for_gpus(
    kind: str, weighted: bool, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("WORKBENCH_KERNELS_CACHE", str(tmp_path))
    assert program(kind, weighted).cubin(architecture).startswith(b"\x7fELF")


@pytest.mark.parametrize("kind", dispatch.ENCODERS)
def test_it_is_taken_for_k_quants_where_it_can_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def fill(kind: str, found: Any, weight: Any, importance: Any) -> None:
        called.append(kind)
        found.zero_()

    monkeypatch.setattr(dispatch.nvrtc, "available", lambda device: True)
    monkeypatch.setattr(dispatch.compiled_k_quants, "fill", fill)
    encode(kind, torch.randn(2, 256))
    assert called == ([kind] if kind.endswith("_K") else [])
