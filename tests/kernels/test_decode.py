"""One row by CUDA C++: on a CPU that stands in for a GPU's threads (`emulated.h`), compiled for GPUs that need not be
there, and on a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.kernel_cases import SCALES_AT, product, tolerance, weight_of

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

EMULATED = Path(__file__).with_name("emulated.h").read_text(encoding="utf-8")
CAST = "(const u16*)a[0], (const char*)a[1], (u16*)a[2]"
KINDS = [name for name in SCALES_AT if name not in ("Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL")]
CASES = {name: {"op": "blocks", "kind": name, "N": 41, "K": 1280} for name in KINDS}


def launch_of(case: dict[str, Any], x: Any, packed: tuple[Any, ...]) -> Any:
    from workbench_kernels import decode
    from workbench_kernels.gguf.types import block_type

    return decode.rows_launch(block_type(case["kind"]), x, *packed)


def emulate(launch: Any, folder: Path) -> None:
    """Run it on this machine's processors."""
    across, down = (*launch.grid, 1)[:2]
    text = f"""{EMULATED}
{launch.program.source}
extern "C" void run(void** a) {{
    launched({across}, {down}, {32 * launch.warps}, [=] {{ rows({CAST}); }});
}}
"""
    (folder / "emulated.cc").write_text(text, encoding="utf-8")
    library = folder / "emulated.so"
    command = ["c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", *launch.program.options]
    subprocess.run([*command, folder / "emulated.cc", "-o", library], check=True)
    places = [tensor.data_ptr() for tensor in launch.arguments]
    ctypes.CDLL(str(library)).run((ctypes.c_void_p * len(places))(*places))


def error(y: Any, x: Any, weight: Any) -> float:
    exact = x.double() @ weight.double().t()
    return float((y.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    case = CASES[name] | {"M": 1, "dtype": dtype}
    weight, packed = weight_of(case)
    x = torch.randn(1, case["K"]).to(getattr(torch, dtype))
    launch = launch_of(case, x, packed)
    launch.out.fill_(float("nan"))
    emulate(launch, tmp_path)
    assert error(launch.out, x, weight) < tolerance(case)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiled_without_spills(name: str, architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    pytest.importorskip("triton")
    from workbench_kernels import compiled

    monkeypatch.setenv("WORKBENCH_KERNELS_CACHE", str(tmp_path))
    case = CASES[name] | {"M": 1, "dtype": "float16"}
    launch = launch_of(case, torch.randn(1, case["K"]).half(), weight_of(case)[1])
    words, registers = compiled._machine_code(launch.program.cubin(architecture))
    assert not any(word.startswith("STL") for word in words) and registers <= 65536 // (32 * launch.warps)
    assert any("MMA" in word for word in words)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product takes it, at once and in a graph, and repeats itself."""
    from workbench_kernels import decode

    monkeypatch.setattr(decode, "ASKED", "")
    monkeypatch.setattr("workbench_kernels.products.plan", lambda *_: pytest.fail("Triton was taken"))
    case = CASES[name] | {"M": 1, "dtype": dtype}
    weight, packed = weight_of(case)
    x = torch.randn(1, case["K"]).to(getattr(torch, dtype))
    moved = tuple(tensor.cuda() for tensor in packed)
    y = product(case, x.cuda(), moved, "decode")
    assert error(y.cpu(), x, weight) < tolerance(case)
    here = x.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [product(case, here, moved, "decode") for _ in range(3)]
    graph.replay()
    assert all(torch.equal(one, y) for one in again)


def test_it_is_taken_only_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench_kernels import decode, nvrtc
    from workbench_kernels.gguf.types import block_type

    monkeypatch.setattr(nvrtc, "available", lambda device: True)
    planes = torch.zeros(3, 72, dtype=torch.int16)
    x = torch.zeros(1, 256, dtype=torch.float16)
    monkeypatch.setattr(decode, "ASKED", "triton")
    assert decode.rows(block_type("Q4_K"), "decode", x, planes) is None
    monkeypatch.setattr(decode, "ASKED", "")
    assert decode.rows(block_type("Q4_K"), "decode", x, planes) is not None
    assert decode.rows(block_type("Q4_K"), "prefill", x, planes) is None
    assert decode.rows(block_type("Q4_K"), "decode", x.float(), planes) is None
    assert decode.rows(block_type("Q2_K"), "decode", x, torch.zeros(3, 42, dtype=torch.int16)) is None
