"""GGUF's blocks in GPTQ's layout: the same weights, by two other readers; and the way there and back."""

from __future__ import annotations

import pytest

from tests.worker.unpacking import dequantize_gptq
from workbench.worker.ggml import carry
from workbench.worker.ggml.repack import BITS, repacked

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("kind", BITS)
def test_the_weights_are_the_blocks(kind: str) -> None:
    """The `gguf` package's of the blocks, and our other unpacking's of the layout, which is in tests alone."""
    weight = np.random.default_rng(5).normal(0, 1, (64, 96)).astype(np.float32)
    rows = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])
    made = repacked(kind, rows)
    assert made["qweight"].shape == (96 * BITS[kind] // 32, 64) and made["scales"].dtype == torch.float16
    assert made["qzeros"].shape == (3, 64 * BITS[kind] // 32)
    found = dequantize_gptq(made | {"g_idx": torch.arange(96) // 32}, BITS[kind])
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", BITS)
def test_it_is_the_way_back_of_carry(kind: str) -> None:
    chance = np.random.default_rng(6)
    codes = chance.integers(0, 2 ** BITS[kind], (32, 64)).astype(np.uint8)
    scales = chance.normal(0, 1, (32, 2)).astype(np.float16)
    zeros = np.full((32, 2), 2 ** (BITS[kind] - 1), np.uint8)
    made = repacked(kind, carry.blocks(kind, codes, zeros, scales))
    again = dequantize_gptq(made | {"g_idx": torch.arange(64) // 32}, BITS[kind])
    assert torch.equal(again, carry.meaning(codes, zeros, scales))


def test_outputs_that_fill_no_words_are_refused() -> None:
    rows = gguf.quants.quantize(np.ones((12, 32), np.float32), gguf.GGMLQuantizationType.Q4_0)
    with pytest.raises(ValueError, match="12 codes of 4 bits do not fill whole 32-bit words"):
        repacked("Q4_0", rows)
