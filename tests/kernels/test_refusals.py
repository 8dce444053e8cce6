"""What is not covered is a `ValueError` that names the tensor and says what is supported; never a wrong number."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.kernel_cases import random_blocks, random_words, weight_of

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from workbench_kernels import awq, gptq  # noqa: E402
from workbench_kernels.checks import check_aligned  # noqa: E402
from workbench_kernels.gguf.blocks import dequantize, matmul  # noqa: E402
from workbench_kernels.gguf.planes import split  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES, block_type  # noqa: E402
from workbench_kernels.modules import AwqLinear, BlockLinear, GptqLinear  # noqa: E402

AWQ = {"op": "awq", "N": 16, "K": 64, "group": 32}
GPTQ = {"op": "gptq", "bits": 4, "order": "plain", "N": 16, "K": 64, "group": 32}
Q4_K = block_type("Q4_K")


def test_unknown_block_type_names_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has type IQ3_S; supported: Q8_0, Q6_K"):
        block_type("IQ3_S", "blk.0.ffn_up.weight")
    assert len(BLOCK_TYPES) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), r"x is float64; supported: float16, bfloat16, float32"),
        (lambda x: x.int(), r"x is int32; supported"),
        (lambda x: x[:, :-1].contiguous(), r"x has shape \(3, 511\); supported: last dimension 512"),
        (lambda x: torch.stack([x, x], 2)[:, :, 0], r"x has strides \(1024, 2\) .*supported: contiguous"),
        (lambda x: x.t().contiguous().t(), r"x has strides \(1, 3\)"),
        (lambda x: x.to("meta"), r"x is on meta, the weight on cpu; supported: both on one device"),
    ],
)
def test_activations(change: Any, words: str) -> None:
    planes = split(Q4_K, random_blocks("Q4_K", 5, 512))
    with pytest.raises(ValueError, match=words):
        matmul(Q4_K, change(torch.randn(3, 512)), planes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.to(torch.int8), r"Q4_K blocks is int8; supported: uint8"),
        (lambda d: d[0], r"Q4_K blocks has shape \(288,\); supported: \[any, any\]"),
        (lambda d: d[:, :-1].contiguous(), r"rows of 287 bytes; supported for Q4_K: multiples of 144 \(256 weights"),
        (lambda d: d[:, :144], r"Q4_K blocks has strides \(288, 1\).*supported: contiguous"),
        (lambda d: d.t(), r"strides"),
        (lambda d: d[:, :0].contiguous(), r"rows of 0 bytes"),
    ],
)
def test_blocks(change: Any, words: str) -> None:
    data = change(random_blocks("Q4_K", 5, 512))
    with pytest.raises(ValueError, match=words):
        split(Q4_K, data)
    with pytest.raises(ValueError, match=words.replace("Q4_K blocks", "data")):
        BlockLinear(data, "Q4_K")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.view(torch.uint8), r"Q4_K planes is uint8; supported: int16"),
        (lambda p: p[:, :-1].contiguous(), r"Q4_K planes has rows of 286 bytes; supported for Q4_K: multiples of 144"),
        (lambda p: p.t(), r"Q4_K planes has strides"),
    ],
)
def test_planes(change: Any, words: str) -> None:
    """Blocks of a file are no planes: they would give wrong numbers."""
    planes = change(split(Q4_K, random_blocks("Q4_K", 5, 512)))
    with pytest.raises(ValueError, match=words):
        matmul(Q4_K, torch.randn(3, 512), planes)
    with pytest.raises(ValueError, match=words):
        dequantize(Q4_K, planes)


def test_kernels_want_aligned_tensors() -> None:
    shifted = torch.zeros(32, dtype=torch.int16)[4:21].view(1, 17)
    with pytest.raises(ValueError, match="Q8_0 planes begins at an odd address; supported: a multiple of 16 bytes"):
        check_aligned({"Q8_0 planes": shifted})
    assert matmul(block_type("Q8_0"), torch.ones(1, 32), shifted).shape == (1, 1), "the reference takes any"


def test_columns_that_fill_no_block() -> None:
    with pytest.raises(ValueError, match="576 columns; supported by Q4_K: multiples of 256"):
        block_type("Q4_K").row_bytes(576)


def test_types_to_dequantize_to() -> None:
    with pytest.raises(ValueError, match="Q4_K planes to float64; supported: float16, bfloat16, float32"):
        dequantize(Q4_K, split(Q4_K, random_blocks("Q4_K", 1, 256)), torch.float64)


def test_paths() -> None:
    data, x = split(Q4_K, random_blocks("Q4_K", 2, 256)), torch.randn(2, 256)
    with pytest.raises(ValueError, match="path 'fast': supported are auto, reference, decode, prefill, dense"):
        matmul(Q4_K, x, data, path="fast")
    # Without a GPU and without the interpreter a kernel is refused, not silently replaced.
    with pytest.raises(ValueError, match="kernels run on CUDA devices|needs Triton"):
        matmul(Q4_K, x, data, path="prefill")
    with pytest.raises(ValueError, match="kernels run on CUDA devices|needs Triton"):
        dequantize(Q4_K, data, path="kernel")


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        (0, lambda t: t.long(), "qweight is int64; supported: int32"),
        (1, lambda t: t[:1].contiguous(), r"qzeros has shape \(1, 2\); supported: \[2, 2\]"),
        (2, lambda t: t.float(), "scales is float32; supported: float16"),
        (2, lambda t: t.bfloat16(), "scales is bfloat16; supported: float16"),
        (2, lambda t: t[:, :8].contiguous(), r"scales has shape \(2, 8\); supported: \[any, 16\]"),
        (0, lambda t: t.t().contiguous().t(), "qweight has strides"),
        (1, lambda t: t.to("meta"), "qweight on cpu, qzeros on meta, scales on cpu; supported: all parts"),
    ],
)
def test_awq(which: int, change: Any, words: str) -> None:
    parts = list(weight_of(AWQ)[1])
    parts[which] = change(parts[which])
    with pytest.raises(ValueError, match=words):
        awq.matmul(torch.randn(1, 64), *parts)
    with pytest.raises(ValueError, match=words):
        AwqLinear(*parts)


@pytest.mark.parametrize(
    ("groups", "words"), [(3, "3 groups for 64 input channels"), (8, "groups of 8; supported: mu")]
)
def test_awq_groups(groups: int, words: str) -> None:
    parts = random_words(64, 2), random_words(groups, 2), torch.rand(groups, 16).half()
    with pytest.raises(ValueError, match=words):
        awq.matmul(torch.randn(1, 64), *parts)


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        (0, lambda t: t.view(torch.float32), "qweight is float32; supported: int32"),
        (1, lambda t: t[:, :1].contiguous(), r"qzeros has shape \(2, 1\); supported: \[2, 2\]"),
        (2, lambda t: t.float(), "scales is float32; supported: float16"),
        (3, lambda t: t[:-1].contiguous(), r"g_idx has shape \(63,\); supported: \[64\]"),
        (3, lambda t: t.long(), "g_idx is int64; supported: int32"),
    ],
)
def test_gptq(which: int, change: Any, words: str) -> None:
    parts = list(weight_of(GPTQ)[1])
    parts[which] = change(parts[which])
    with pytest.raises(ValueError, match=words):
        gptq.matmul(torch.randn(1, 64), *parts, 4)


@pytest.mark.parametrize("bits", [3, 5, 16])
def test_gptq_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"qweight has {bits} bits; supported: 2, 4, 8"):
        gptq.matmul(torch.randn(1, 64), *weight_of(GPTQ)[1], bits)


def test_g_idx_beyond_the_scales_is_found_at_load() -> None:
    qweight, qzeros, scales, g_idx = weight_of(GPTQ)[1]
    for wrong in (2, -1):
        g_idx = g_idx.clone()
        g_idx[5] = wrong
        with pytest.raises(ValueError, match="g_idx names groups .*supported: 0 to 1"):
            GptqLinear(qweight, qzeros, scales, g_idx, 4)


def test_a_bias_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); supported: \[5\]"):
        BlockLinear(random_blocks("Q8_0", 5, 64), "Q8_0", torch.zeros(4))


def test_no_rows_at_all() -> None:
    planes = split(block_type("Q8_0"), random_blocks("Q8_0", 5, 64))
    assert matmul(block_type("Q8_0"), torch.randn(0, 64), planes).shape == (0, 5)
