"""The encoders against llama.cpp's own, to the byte."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

from workbench_kernels.encoders.encode import ENCODERS, PIECE, encode  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES  # noqa: E402

COLUMNS = 512
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def by_llama_cpp(kind: str, weight: Any, importance: Any = None) -> Any:
    """`ggml_quantize_chunk` of the library that llama-cpp-python brings."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    number = gguf.GGMLQuantizationType[kind]
    count, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    out = torch.zeros(rows, columns // count * size, dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    written = quantize(int(number), weight.data_ptr(), out.data_ptr(), 0, rows, columns, pointer)
    assert written == out.numel()
    return out


def weights(seed: int) -> Iterator[tuple[str, Any]]:
    """Blocks as models have them, and what a search stumbles over: zeros of both signs, ties, flat runs, values on the
    grid, outliers, sizes from float32's smallest to where float16 still holds the scale."""
    chance = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Any:
        return torch.randn(rows, COLUMNS, generator=chance)

    uniform = torch.rand(24, COLUMNS, generator=chance)
    yield "normal", normal(48) * 0.02
    yield "bfloat16", (normal(24) * 0.02).bfloat16().float()
    yield "of all sizes", normal(80) * torch.logspace(-6, 3, 80)[:, None]
    yield "heavy tails", normal(24) / normal(24).abs().clamp(min=1e-3) * 0.01
    spikes = normal(24)
    spikes[:, ::256] *= 1e4
    yield "spikes", spikes
    yield "zeros", torch.tensor([[0.0], [-0.0]]).expand(2, COLUMNS).contiguous()
    yield "half zeros", torch.where(uniform < 0.5, -0.0, normal(24))
    yield "sparse", torch.where(uniform < 0.95, 0.0, normal(24))
    flat = torch.linspace(-1, 1, 9)[:, None].expand(9, COLUMNS).contiguous()
    yield "flat", flat
    outlying = flat.clone()
    outlying[:, ::37] *= 3
    yield "flat but for some", outlying
    yield "two values", torch.where(uniform < 0.9, -1.0, torch.where(uniform < 0.95, -3.0, -1.0000001))
    yield "nearly flat", normal(24) * 1e-7 - 1
    yield "one sign", torch.cat([normal(16).abs() + 0.1, -normal(16).abs() - 0.1])
    yield "whole", (normal(24) * 4).round()
    yield "on a grid", torch.randint(-8, 8, (24, COLUMNS), generator=chance) * 0.125
    exponents = torch.randint(-12, 3, (24, COLUMNS // 16, 1), generator=chance).expand(-1, -1, 16)
    yield "runs of all sizes", normal(24) * 10.0 ** exponents.reshape(24, COLUMNS)
    exponents = torch.randint(-45, -13, (24, COLUMNS // 32, 1), generator=chance).expand(-1, -1, 32)
    yield "tiny and denormal", normal(24) * 10.0 ** exponents.reshape(24, COLUMNS)
    yield "each of its own size", normal(24) * 10.0 ** torch.randint(-44, 4, (24, COLUMNS), generator=chance)
    bits = torch.randint(-(2**31), 2**31 - 1, (24, COLUMNS), generator=chance).to(torch.int32).view(torch.float32)
    yield "any bits", torch.where(bits.abs() < 1e4, bits, 0.0)


def importances(seed: int) -> Iterator[tuple[str, Any]]:
    chance = torch.Generator().manual_seed(seed + 1000)
    uniform = torch.rand(COLUMNS, generator=chance)
    yield "none", None
    yield "as measured", uniform**4 + 1e-6
    yield "some zeros", torch.where(uniform < 0.3, 0.0, uniform)
    yield "nearly all zeros", torch.where(uniform < 0.97, 0.0, uniform)
    yield "all zeros", torch.zeros(COLUMNS)
    yield "of all sizes", uniform * 10.0 ** torch.randint(-30, 8, (COLUMNS,), generator=chance)


def test_every_type_with_an_encoder_is_one_with_a_kernel() -> None:
    assert set(ENCODERS) == set(BLOCK_TYPES) - {"IQ4_XS", "IQ4_NL"}
    for name, kind in BLOCK_TYPES.items():
        sizes = kind.layout.weights, kind.layout.size_bytes
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_bytes_are_llama_cpps(kind: str, device: str) -> None:
    size, seen, blocks = BLOCK_TYPES[kind].layout.size_bytes, set(), list(weights(0))
    whole = torch.cat([weight for _, weight in blocks])
    for said, importance in importances(0):
        on_device = None if importance is None else importance.to(device)
        found = encode(kind, whole.to(device), on_device).cpu()
        wanted = by_llama_cpp(kind, whole, importance)
        parts = (each.split([len(weight) for _, weight in blocks]) for each in (found, wanted))
        for (name, _), ours, theirs in zip(blocks, *parts, strict=True):
            other = (ours.reshape(-1, size) != theirs.reshape(-1, size)).any(1)
            assert not bool(other.any()), f"{name}, importances {said}: {int(other.sum())} of {other.numel()} blocks"
            seen.add((name, bytes(ours.numpy().tobytes())))
    different = len(seen) / len({name for name, _ in seen})
    assert different == 1 if kind == "Q8_0" else different > 3, "importances matter"


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_size_of_a_piece_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, COLUMNS, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(2))
    whole = encode(kind, weight, importance)
    for rows in (0, 2, 3):
        monkeypatch.setitem(PIECE, "cpu", rows * COLUMNS + 1)
        assert torch.equal(encode(kind, weight, importance), whole)
    assert torch.equal(encode(kind, weight.t().contiguous().t(), importance), whole), "strides"


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (37, 256), (1, 1280), (5, 768), (0, 256)])
@pytest.mark.parametrize("kind", ENCODERS)
def test_any_shape(kind: str, rows: int, columns: int) -> None:
    chance = torch.Generator().manual_seed(4)
    weight, importance = torch.randn(rows, columns, generator=chance), torch.rand(columns, generator=chance)
    assert torch.equal(encode(kind, weight), by_llama_cpp(kind, weight))
    assert torch.equal(encode(kind, weight, importance), by_llama_cpp(kind, weight, importance))


@pytest.mark.parametrize("kind", ENCODERS)
def test_what_is_made_is_near_what_it_was_made_of(kind: str) -> None:
    """By this package's own de-quantizer, so that an encoder and a kernel cannot drift apart."""
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(3))
    layout = BLOCK_TYPES[kind].layout
    blocks = encode(kind, weight).view(-1, layout.size_bytes)
    error = (BLOCK_TYPES[kind].reference(blocks).view_as(weight) - weight).square().mean().sqrt()
    bits = layout.size_bytes * 8 / layout.weights
    assert 0 < error < 3 * 2**-bits


@pytest.mark.parametrize(
    ("kind", "weight", "importance", "words"),
    [
        ("IQ4_XS", torch.randn(2, 256), None, "type IQ4_XS; supported: Q8_0, Q6_K, "),
        ("Q8_0", torch.randn(2, 33), None, "weight has 33 columns; supported for Q8_0: multiples of 32"),
        ("Q4_K", torch.randn(2, 128), None, "weight has 128 columns; supported for Q4_K: multiples of 256"),
        ("Q4_0", torch.randn(2, 32).half(), None, "weight is float16 with 2 dimensions; supported: float32"),
        ("Q4_0", torch.randn(32), None, "weight is float32 with 1 dimensions; supported: float32"),
        ("Q8_0", torch.full((1, 32), float("nan")), None, "weight holds NaN or infinity; supported: finite"),
        ("Q4_0", torch.full((1, 32), 1e6), None, "too large for the float16 scales of Q4_0"),
        ("Q2_K", torch.full((1, 256), -1e6), torch.ones(256), "too large for the float16 scales of Q2_K"),
        ("Q4_0", torch.randn(2, 32), torch.ones(31), r"importance is float32 \(31,\); supported: float32 \[32\]"),
        ("Q4_0", torch.randn(2, 32), torch.ones(32).half(), r"importance is float16 \(32,\); supported: float32"),
        ("Q4_0", torch.randn(2, 32), torch.ones(32, device="meta"), "importance is on meta, weight on cpu"),
        ("Q4_0", torch.randn(2, 32), -torch.ones(32), "importance holds numbers below zero or not finite"),
        ("Q4_0", torch.randn(2, 32), torch.full((32,), float("inf")), "below zero or not finite"),
    ],
)
def test_what_cannot_be_encoded(kind: str, weight: Any, importance: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(kind, weight, importance)
