"""The numbers in blocks against llama.cpp's own de-quantization, and back into the same bytes."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from workbench_kernels.encoders.numbers import NUMBERS  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES  # noqa: E402


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_out_of_their_numbers_are_the_same_bytes(kind: str) -> None:
    """Of random bytes: every scale, minimum and code there can be. Their weights are those of the formula."""
    layout, numbers = BLOCK_TYPES[kind].layout, NUMBERS[kind]
    blocks = torch.randint(0, 256, (2000, layout.size_bytes), generator=torch.Generator().manual_seed(1)).byte()
    blocks = blocks[BLOCK_TYPES[kind].reference(blocks).isfinite().all(1)]
    scales = numbers.scales(blocks)
    low, high = numbers.inner
    assert scales.scale.min() >= low and scales.scale.max() <= high
    assert scales.dmin.any() == numbers.shifted
    step, shift = scales.d * scales.scale, scales.dmin * scales.least
    weights = BLOCK_TYPES[kind].reference(blocks).view(len(blocks), -1, numbers.run)
    levels = torch.tensor(numbers.table or range(numbers.codes), dtype=torch.float32)
    levels -= 0 if numbers.table else numbers.less
    # Every weight is some level of its run; where a step is 0 or nothing beside the shift, several.
    possible = step[:, :, None] * levels - shift[:, :, None]
    away, codes = (weights[..., None] - possible[:, :, None, :]).abs().min(-1)
    assert float((away / weights.abs().clamp(min=1e-20)).max()) < 1e-6
    sure = (step.abs() > 1e-5 * shift.abs()).all(1)
    made = numbers.pack(scales, codes.view(len(blocks), -1).int())
    assert int(sure.sum()) > 50 and torch.equal(made[sure], blocks[sure])


def test_every_type_with_a_kernel_has_numbers() -> None:
    assert set(NUMBERS) == set(BLOCK_TYPES)
