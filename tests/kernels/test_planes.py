"""Blocks sorted into planes when a layer is loaded: every byte once, where wide loads may begin, and back again."""

from __future__ import annotations

import math

import pytest

from tests.kernels.kernel_cases import SCALES_AT, by_gguf, random_blocks

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")

from workbench_kernels.gguf.blocks import dequantize  # noqa: E402
from workbench_kernels.gguf.planes import held, join, split, taken  # noqa: E402
from workbench_kernels.gguf.types import BLOCK_TYPES  # noqa: E402

TYPES = sorted(BLOCK_TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_there_and_back(name: str) -> None:
    """Every byte, in as many bytes, and the numbers that the `gguf` package reads out of the file's."""
    kind = BLOCK_TYPES[name]
    data = random_blocks(name, 7, 3 * kind.layout.weights)
    planes = split(kind, data)
    assert planes.dtype == torch.int16 and planes.nbytes == data.nbytes
    assert torch.equal(join(kind, planes), data) and torch.equal(join(kind, planes, 2, 5), data[2:5])
    assert torch.equal(dequantize(kind, planes), by_gguf(name, data))
    assert torch.equal(dequantize(kind, planes, rows=range(2, 5)), by_gguf(name, data)[2:5])


@pytest.mark.parametrize("name", TYPES)
def test_a_plane_holds_one_part_of_all_blocks(name: str) -> None:
    layout, data = BLOCK_TYPES[name].layout, random_blocks(name, 2, 2 * BLOCK_TYPES[name].layout.weights)
    blocks = data.view(4, layout.size_bytes)
    expected = torch.cat([blocks[:, first:end].reshape(-1) for first, end in layout.planes])
    assert torch.equal(split(BLOCK_TYPES[name], data).view(torch.uint8).view(-1), expected)


@pytest.mark.parametrize("name", TYPES)
def test_the_parts_are_the_whole_block_and_wide_loads_come_first(name: str) -> None:
    """Whatever the number of blocks, a plane begins at a multiple of what its parts are a multiple of, up to 16."""
    layout, before = BLOCK_TYPES[name].layout, 0
    assert sorted(byte for part in layout.planes for byte in range(*part)) == list(range(layout.size_bytes))
    for first, end in layout.planes:
        assert before % math.gcd(16, end - first) == 0
        before += end - first
    first, end = layout.planes[0]
    assert (end - first) % 16 == 0 and all(not first <= at < end for at in SCALES_AT[name]), "codes come first"


def test_rows_are_gathered() -> None:
    kind, rows = BLOCK_TYPES["Q6_K"], torch.tensor([6, 0, 6, 3])
    data = random_blocks("Q6_K", 7, 512)
    assert torch.equal(taken(kind, split(kind, data), rows), split(kind, data[rows]))
    with pytest.raises(IndexError):
        taken(kind, split(kind, data), torch.tensor([7]))


def test_what_is_in_planes_already_is_held_as_it_is() -> None:
    kind = BLOCK_TYPES["Q4_0"]
    planes = split(kind, random_blocks("Q4_0", 3, 64))
    again, columns = held(kind, planes, "data")
    assert again is planes and columns == 64
    with pytest.raises(ValueError, match="data has rows of 34 bytes; supported for Q4_0: multiples of 18"):
        held(kind, planes[:, :-1].contiguous(), "data")


@pytest.mark.parametrize("name", TYPES)
def test_no_blocks_at_all(name: str) -> None:
    kind = BLOCK_TYPES[name]
    none = torch.empty(0, kind.layout.size_bytes, dtype=torch.uint8)
    assert join(kind, split(kind, none)).shape == none.shape
