"""CUDA C++ compiled at run time: for GPUs that need not be there; launched where there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SCALED = """
extern "C" __global__ void scaled(float* x, int n, float by) {
    extern __shared__ float staged[];
    staged[threadIdx.x] = by * PLUS;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = x[i] * by + PLUS + 0 * staged[threadIdx.x];
}
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for machine code, empty."""
    monkeypatch.setenv("WORKBENCH_KERNELS_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_machine_code_is_made_once(architecture: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from workbench_kernels import nvrtc

    made = nvrtc._cubin.__wrapped__(nvrtc.compiled(SCALED, "-DPLUS=1"), architecture)
    assert made.startswith(b"\x7fELF")
    assert [path.read_bytes() for path in cache.iterdir()] == [made]
    nvrtc._cubin.__wrapped__(nvrtc.compiled(SCALED, "-DPLUS=2"), architecture)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(nvrtc, "_compile", lambda *_: pytest.fail("it was kept"))
    assert nvrtc._cubin.__wrapped__(nvrtc.compiled(SCALED, "-DPLUS=1"), architecture) == made


def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from workbench_kernels import nvrtc

    cache.write_text("a file where the folder should be")
    assert nvrtc._cubin.__wrapped__(nvrtc.compiled(SCALED, "-DPLUS=1"), 90).startswith(b"\x7fELF")


def test_what_does_not_compile_is_said(cache: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from workbench_kernels import nvrtc

    with pytest.raises(RuntimeError, match='sm_90.*identifier "PLUS" is undefined'):
        nvrtc.compiled(SCALED).cubin(90)
    assert not cache.exists()


def test_nothing_is_available_on_the_cpu() -> None:
    from workbench_kernels import nvrtc

    assert not nvrtc.available(torch.device("cpu"))
    assert nvrtc.compiled("text", "-O") is nvrtc.compiled("text", "-O")


@pytest.mark.parametrize("answer", [(0, [80, 90]), (0, 2, [80, 90])], ids=["cuda-bindings 13", "with their number"])
def test_available_is_what_the_compiler_knows(answer: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench_kernels import nvrtc

    monkeypatch.setattr(nvrtc, "driver", object())
    monkeypatch.setattr(nvrtc, "nvrtc", SimpleNamespace(nvrtcGetSupportedArchs=lambda: answer))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for architecture, available in ((90, True), (100, False), (75, False)):
        monkeypatch.setattr(nvrtc, "architecture_of", lambda device, found=architecture: found)
        assert nvrtc.available.__wrapped__(torch.device("cuda", 0)) is available


@pytest.mark.gpu
@pytest.mark.parametrize("shared_bytes", [512, 60 * 1024])
@pytest.mark.parametrize("dependent", [False, True])
def test_launched(shared_bytes: int, dependent: bool) -> None:
    """At once, and in a CUDA graph."""
    from workbench_kernels import nvrtc

    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    program = nvrtc.compiled(SCALED, "-DPLUS=3")

    def launch() -> None:
        program.launch("scaled", (8,), 128, (x, 999, 2.0), shared_bytes=shared_bytes, dependent=dependent)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
        launch()
    graph.replay()
    expected = torch.arange(1000, dtype=torch.float32)
    expected[:999] = 8 * expected[:999] + 3 * 7
    assert torch.equal(x.cpu(), expected)
