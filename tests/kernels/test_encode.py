"""The encoders against llama.cpp's own, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

from workbench_kernels.encoders.encode import ENCODERS, PIECE, encode  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES  # noqa: E402

from tests.kernels.encoder_cases import COLUMNS, by_llama_cpp, importances, weights  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
