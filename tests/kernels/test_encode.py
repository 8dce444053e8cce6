"""The encoders against llama.cpp's own, to the byte."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
llama_cpp = pytest.importorskip("llama_cpp")

from workbench_kernels import encode  # noqa: E402

TYPES = {"Q4_0": (2, 18), "Q8_0": (8, 34)}
"""llama.cpp's number of a type, and bytes of a block."""


def by_llama_cpp(kind: str, weight: Any, importance: Any = None) -> Any:
    """`ggml_quantize_chunk` of the library that llama-cpp-python brings."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    number, size = TYPES[kind]
    rows, columns = weight.shape
    out = torch.zeros(rows, columns // 32 * size, dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    written = quantize(number, weight.data_ptr(), out.data_ptr(), 0, rows, columns, pointer)
    assert written == out.numel()
    return out


def weights(seed: int = 0) -> Any:
    """Rows of very different sizes, with zeros, ties, denormal scales and values on the grid."""
    chance = torch.Generator().manual_seed(seed)
    weight = torch.randn(257, 384, generator=chance) * torch.logspace(-6, 3, 257)[:, None]
    weight[3] = 0
    weight[4, :32] = 0
    weight[5] = weight[5].round()
    weight[6] = torch.linspace(-127, 127, 384).round() / 127
    weight[7] = torch.arange(384) % 17 - 8.0
    weight[8] = (torch.arange(384) % 16 - 8.0) / 2
    weight[9] *= 1e-30
    weight[10, ::2] = -weight[10, 1::2]
    weight[11] = 1e-16
    return weight


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_bytes_are_llama_cpps(kind: str, device: str) -> None:
    function = getattr(encode, kind.lower())
    for seed in range(4):
        weight = weights(seed)
        assert torch.equal(function(weight.to(device)).cpu(), by_llama_cpp(kind, weight))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bytes_with_importances_are_llama_cpps(device: str) -> None:
    for seed in range(2):
        weight = weights(seed)
        importance = torch.rand(384, generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-6
        found = encode.q4_0(weight.to(device), importance.to(device)).cpu()
        expected = by_llama_cpp("Q4_0", weight, importance)
        assert torch.equal(found, expected), int((found.view(-1, 18) != expected.view(-1, 18)).any(1).sum())
    assert not torch.equal(expected, by_llama_cpp("Q4_0", weight)), "importances matter"


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.randn(2, 33), "weight has 33 columns; supported: multiples of 32"),
        (torch.randn(2, 32).half(), "weight is float16 with 2 dimensions; supported: float32"),
        (torch.full((1, 32), float("nan")), "weight holds NaN or infinity; supported: finite"),
    ],
)
def test_what_cannot_be_encoded(weight: Any, words: str) -> None:
    for function in (encode.q8_0, encode.q4_0):
        with pytest.raises(ValueError, match=words):
            function(weight)


def test_importances_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"importance is float32 \(31,\); supported: float32 \[32\]"):
        encode.q4_0(torch.randn(2, 32), torch.ones(31))
